# SPDX-License-Identifier: Apache-2.0
"""Training: jobs, the loop, callbacks, search."""
