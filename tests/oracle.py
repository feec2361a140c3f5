"""Slow, obvious versions of everything fast. Nothing here is imported by nestvec."""

import math

import numpy as np
