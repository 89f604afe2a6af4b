import subprocess
import sys


def test_importing_the_models_needs_jax_and_flax_alone():
    code = (
        'import sys, epsanet_jax; epsanet_jax.create_model("epsanet50_small"); '
        'heavy = {"tensorflow", "torch", "grain", "tensorflow_datasets", "ml_collections", "PIL"}; '
        'print(sorted(heavy & set(sys.modules)))'
    )
    output = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == '[]'


def test_no_tensorflow_is_installed_for_any_of_the_tests():
    import importlib.util

    assert importlib.util.find_spec('tensorflow') is None
