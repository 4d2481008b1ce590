"""Problems with worked traces: what the mini R1 is trained on and graded by."""
