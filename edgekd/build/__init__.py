# SPDX-License-Identifier: Apache-2.0
"""A whole build: from a request to the verdicts."""
