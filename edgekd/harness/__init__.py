# SPDX-License-Identifier: Apache-2.0
"""The measuring program that is shipped to devices."""
