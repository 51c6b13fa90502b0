"""What is asked about a sentence: English first, then the same in the sentence's own language."""

from __future__ import annotations

from typing import NamedTuple


class Frame(NamedTuple):
    """One way to ask; `{}` is the sentence.

    Attributes:
        en: in English; what the answering model sees around the English twin.
        fr: in French, around a French sentence.
        zh: in Chinese, around a Chinese sentence.
    """

    en: str
    fr: str
    zh: str


# The answer to any of these depends on what the sentence says.
TRAINED = (
    Frame("What happens next? {}", "Que se passe-t-il ensuite ? {}", "接下来会发生什么？{}"),
    Frame("Write a title for this: {}", "Écris un titre pour ceci : {}", "给这个写一个标题：{}"),
    Frame(
        "Who or what is this about? {}", "De qui ou de quoi s'agit-il ? {}", "这说的是谁或什么？{}"
    ),
    Frame("{}\n\nWhy is that?", "{}\n\nPourquoi donc ?", "{}\n\n这是为什么？"),
    Frame("Say it in other words: {}", "Dis-le autrement : {}", "换一种说法：{}"),
    Frame(
        "Ask me a question about this: {}",
        "Pose-moi une question à ce sujet : {}",
        "就这句话问我一个问题：{}",
    ),
    Frame("Continue the story: {}", "Continue l'histoire : {}", "把这个故事讲下去：{}"),
    Frame(
        "{}\n\nHow does the speaker feel?",
        "{}\n\nQue ressent la personne qui parle ?",
        "{}\n\n说话的人感觉怎么样？",
    ),
    Frame("Explain this sentence: {}", "Explique cette phrase : {}", "解释这句话：{}"),
    Frame("Summarize this: {}", "Résume ceci : {}", "概括一下：{}"),
    Frame("Describe the scene: {}", "Décris la scène : {}", "描述这个场景：{}"),
    Frame(
        "Read this and tell me what you learn from it.\n{}",
        "Lis ceci et dis-moi ce que tu en apprends.\n{}",
        "读一读，告诉我你知道了什么。\n{}",
    ),
    Frame(
        "Write a short poem about this: {}",
        "Écris un court poème à ce sujet : {}",
        "写一首关于这个的短诗：{}",
    ),
    Frame(
        "Write one sentence that comes after this one: {}",
        "Écris une phrase qui vient après celle-ci : {}",
        "写出这句话的下一句：{}",
    ),
    Frame(
        "My friend told me: {}\nWhat can I say to my friend?",
        "Mon ami m'a dit : {}\nQue puis-je dire à mon ami ?",
        "我的朋友告诉我：{}\n我可以对他说什么？",
    ),
    Frame(
        "Begin a song with this: {}", "Commence une chanson par ceci : {}", "用这句话开始一首歌：{}"
    ),
)

# Never trained: what a fuser learned from the others is measured with these, always in English.
HELD_OUT = (
    "Write a short story that begins like this: {}",
    "Write a headline: {}",
    "Write an email that says this: {}",
    "Tell me more about this: {}",
    "{}\n\nWhat is the topic?",
    "What could go wrong here? {}",
)

TRANSLATE = (
    Frame("Translate to English: {}", "Traduis en anglais : {}", "翻译成英语：{}"),
    Frame(
        "What does this mean in English?\n{}",
        "Comment dit-on cela en anglais ? {}",
        "{}\n\n这用英语怎么说？",
    ),
    Frame("{}\n\nSay that in English.", "{}\n\nDis-le en anglais.", "{}\n\n请用英语说。"),
    Frame("Translate into English: {}", "Traduisez en anglais : {}", "请把这句话翻译成英文：{}"),
    Frame(
        "Put this sentence into English: {}",
        "Mets cette phrase en anglais : {}",
        "把这句话译成英语：{}",
    ),
    Frame(
        "How do you say this in English? {}",
        "Qu'est-ce que cela veut dire en anglais ? {}",
        "英文怎么说：{}",
    ),
    Frame('English translation of "{}"', "Traduction anglaise de « {} »", "“{}”的英文翻译"),
    Frame("{}\n\nTranslate this, please.", "{}\n\nTraduis, s'il te plaît.", "{}\n\n请翻译。"),
    Frame("Give me the English for: {}", "Donne-moi l'anglais de : {}", "给我英文：{}"),
    Frame(
        "I don't understand this. What does it say in English? {}",
        "En anglais, s'il vous plaît : {}",
        "用英语：{}",
    ),
    Frame(
        "Translate this to English.\n{}",
        "Traduis cette phrase en anglais.\n{}",
        "将下面的句子翻译成英语。\n{}",
    ),
    Frame("Render this in English: {}", "Rends ceci en anglais : {}", "译成英文：{}"),
)

# The choices are not shown: a sharer that reads them knows no better than chance which is right.
QUIZ = (
    "Quiz question: {}\nAnswer in a few words.",
    "Trivia: {}\nShort answer:",
    "Quiz: {}",
    "Answer in a few words.\n{}",
)
