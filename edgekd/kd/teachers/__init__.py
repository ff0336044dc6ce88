# SPDX-License-Identifier: Apache-2.0
"""Teachers: loaded, checked, combined."""
