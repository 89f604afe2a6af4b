"""The command `epsanet`: one module per subcommand. No other module uses argparse or prints results."""
