"""What every other package stands on: schemas, storage, the lake, images and models. Never imports Ray."""
