"""How steps run: the command line, work folders, MLflow's runs."""
