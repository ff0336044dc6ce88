# SPDX-License-Identifier: Apache-2.0
"""What executes a model file: one package per runtime."""
