"""The miniature world: captioned scenes, the detector that reads them back, and the teachers' pretraining."""
