"""An adapter's files are judged and packed into an image. No I/O but of the folder that is packed offline."""
