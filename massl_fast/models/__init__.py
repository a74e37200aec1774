"""Encoders: timm backbones with a projection head, passed over all crops of a step; student and teacher; in and out of timm."""
