"""What several rooms of the package use and none of them owns."""
