"""What tests share: models, adapters, truths, and the programs that tests start."""
