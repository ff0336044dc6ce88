# SPDX-License-Identifier: Apache-2.0
"""The concepts of edgekd as frozen dataclasses: standard library only."""
