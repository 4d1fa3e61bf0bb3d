"""What Septum does with the model: conformance with recordings, scenarios, exploration, replay."""
