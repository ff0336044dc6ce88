# SPDX-License-Identifier: Apache-2.0
"""The words of edgekd as frozen data: standard library only."""
