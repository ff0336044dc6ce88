# SPDX-License-Identifier: Apache-2.0
"""Where a model file is executed: one module per kind of device."""
