"""The command `epsanet`: one module per subcommand. Nothing else knows argparse or prints results."""
