# SPDX-License-Identifier: Apache-2.0
"""Teachers: loading them, the safety check of their files, stored logits, ensembles."""
