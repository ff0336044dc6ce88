# SPDX-License-Identifier: Apache-2.0
"""All that knows how to distil."""
