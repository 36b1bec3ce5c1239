"""From a configuration to a model with its adapters on it: the one way, whether its tensors are read, random or fake.

Training, predicting, measuring, evaluating and the export's live side all come here. What differs between them is where
tensors come from, and is passed in. Everything that a run may decide differently from what it was asked is decided in
`resolve`, from the model's configuration alone, before weights or data are read.
"""
