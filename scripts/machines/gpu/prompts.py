"""Fifty prompts that every model is judged by, and how SmolLM2 is spoken to."""

from __future__ import annotations

from tokenizers import Tokenizer

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
ENDS = ("<|im_end|>", "<|endoftext|>")

PROMPTS = (
    "What is the capital of France?",
    "Why is the sky blue?",
    "Write a short poem about the sea.",
    "Explain what a computer does to a child.",
    "Give me three tips for sleeping better.",
    "What is the difference between a frog and a toad?",
    "Who wrote Romeo and Juliet?",
    "How do I boil an egg?",
    "Name five fruits that are red.",
    "What is photosynthesis?",
    "Tell me a story about a dog who gets lost and finds the way home.",
    "What is 7 plus 5?",
    "Translate 'good morning' into Spanish.",
    "How does a bicycle stay upright?",
    "What should I pack for a week at the beach?",
    "Explain gravity in one sentence.",
    "Write an email to my boss asking for a day off.",
    "What are the primary colors?",
    "How many days are in a leap year?",
    "Describe the taste of an orange.",
    "What is the largest planet in the solar system?",
    "Give me a recipe for pancakes.",
    "Why do leaves change color in autumn?",
    "What is machine learning?",
    "List three uses for a paper clip.",
    "Summarize the story of Cinderella in three sentences.",
    "What does the heart do?",
    "How can I learn a new language quickly?",
    "Write a Python function that adds two numbers.",
    "What is the boiling point of water?",
    "Suggest a name for a cat that likes to sleep.",
    "What is democracy?",
    "How do plants drink water?",
    "Write a haiku about winter.",
    "What is the opposite of hot?",
    "Explain why the moon changes its shape.",
    "What are the benefits of exercise?",
    "Who was the first president of the United States?",
    "How do airplanes fly?",
    "Give me two arguments for and two against homework.",
    "What is a synonym for happy?",
    "Describe a busy market in the morning.",
    "What is the purpose of a bank?",
    "How do I remove a coffee stain from a shirt?",
    "What causes earthquakes?",
    "Write the opening sentence of a mystery novel.",
    "Which is heavier, a kilogram of iron or a kilogram of feathers?",
    "What is the water cycle?",
    "Give advice to someone who is nervous before an exam.",
    "What do bees make?",
)


def conversation(question: str) -> str:
    """A question as SmolLM2's own template writes it, up to where the assistant speaks."""
    return f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def ends_of(tokenizer: Tokenizer) -> set[int]:
    """The tokens after which nothing more is said."""
    return {found for text in ENDS if (found := tokenizer.token_to_id(text)) is not None}
