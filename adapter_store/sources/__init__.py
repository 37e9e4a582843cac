"""Where adapters come from: folders (`file://`) and buckets (`s3://`)."""
