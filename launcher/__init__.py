"""lepton-launch: from a YAML recipe to a fine-tuned model, on one machine or on a Ray cluster."""

__version__ = "0.1.0"
