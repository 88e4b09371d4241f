"""Twelve exercises: write the equations of backpropagation yourself, and hear what is wrong.

python -m manual_bp.exercises                     the list
python -m manual_bp.exercises start answers.py    a file with twelve functions to write
python -m manual_bp.exercises check answers.py    what is right, and what is wrong with the rest
"""
