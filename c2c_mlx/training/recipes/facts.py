"""Facts that are asked in five languages, to measure with; nothing here is ever trained on."""

from __future__ import annotations

from typing import NamedTuple


class Fact(NamedTuple):
    """One question in five languages.

    Attributes:
        accept: every text that is right, English first; others are the other languages', for a
            model that answers in them.
        en: in English.
        fr: in French.
        de: in German.
        zh: in Chinese.
        es: in Spanish.
    """

    accept: tuple[str, ...]
    en: str
    fr: str
    de: str
    zh: str
    es: str


# 25 of the 37 that SmolLM2-135M knows, asked in English, of 63 that were tried before there was a
# fuser.
FACTS = (
    Fact(
        ("blue", "bleu", "bleue", "blau", "蓝", "azul"),
        "What color is the sky on a clear day?",
        "De quelle couleur est le ciel par temps clair ?",
        "Welche Farbe hat der Himmel an einem klaren Tag?",
        "晴天时天空是什么颜色？",
        "¿De qué color es el cielo en un día despejado?",
    ),
    Fact(
        ("cold", "froid", "kalt", "冷", "frío"),
        "What is the opposite of hot?",
        "Quel est le contraire de chaud ?",
        "Was ist das Gegenteil von heiß?",
        "“热”的反义词是什么？",
        "¿Cuál es lo contrario de caliente?",
    ),
    Fact(
        ("small", "little", "tiny", "petit", "klein", "小", "pequeño"),
        "What is the opposite of big?",
        "Quel est le contraire de grand ?",
        "Was ist das Gegenteil von groß?",
        "“大”的反义词是什么？",
        "¿Cuál es lo contrario de grande?",
    ),
    Fact(
        ("night", "nuit", "Nacht", "夜", "noche"),
        "What is the opposite of day?",
        "Quel est le contraire du jour ?",
        "Was ist das Gegenteil von Tag?",
        "“白天”的反义词是什么？",
        "¿Cuál es lo contrario del día?",
    ),
    Fact(
        ("black", "noir", "schwarz", "黑", "negro"),
        "What is the opposite of white?",
        "Quel est le contraire de blanc ?",
        "Was ist das Gegenteil von weiß?",
        "“白”的反义词是什么？",
        "¿Cuál es lo contrario de blanco?",
    ),
    Fact(
        ("slow", "lent", "langsam", "慢", "lento"),
        "What is the opposite of fast?",
        "Quel est le contraire de rapide ?",
        "Was ist das Gegenteil von schnell?",
        "“快”的反义词是什么？",
        "¿Cuál es lo contrario de rápido?",
    ),
    Fact(
        ("7", "seven", "sept", "sieben", "七", "siete"),
        "How many days are there in a week?",
        "Combien de jours y a-t-il dans une semaine ?",
        "Wie viele Tage hat eine Woche?",
        "一个星期有几天？",
        "¿Cuántos días tiene una semana?",
    ),
    Fact(
        ("12", "twelve", "douze", "zwölf", "十二", "doce"),
        "How many months are there in a year?",
        "Combien de mois y a-t-il dans une année ?",
        "Wie viele Monate hat ein Jahr?",
        "一年有几个月？",
        "¿Cuántos meses tiene un año?",
    ),
    Fact(
        ("24", "twenty-four", "vingt-quatre", "vierundzwanzig", "二十四", "veinticuatro"),
        "How many hours are there in a day?",
        "Combien d'heures y a-t-il dans une journée ?",
        "Wie viele Stunden hat ein Tag?",
        "一天有多少个小时？",
        "¿Cuántas horas tiene un día?",
    ),
    Fact(
        ("3", "three", "trois", "drei", "三条", "三个", "tres"),
        "How many sides does a triangle have?",
        "Combien de côtés a un triangle ?",
        "Wie viele Seiten hat ein Dreieck?",
        "三角形有几条边？",
        "¿Cuántos lados tiene un triángulo?",
    ),
    Fact(
        ("February", "février", "Februar", "二月", "febrero"),
        "Which month comes after January?",
        "Quel mois vient après janvier ?",
        "Welcher Monat kommt nach Januar?",
        "一月之后是哪个月？",
        "¿Qué mes viene después de enero?",
    ),
    Fact(
        ("December", "décembre", "Dezember", "十二月", "diciembre"),
        "What is the last month of the year?",
        "Quel est le dernier mois de l'année ?",
        "Wie heißt der letzte Monat des Jahres?",
        "一年中的最后一个月是几月？",
        "¿Cuál es el último mes del año?",
    ),
    Fact(
        ("cat", "un chat", "le chat", "Katze", "猫", "gato"),
        "Which animal says meow?",
        "Quel animal fait miaou ?",
        "Welches Tier macht Miau?",
        "哪种动物会喵喵叫？",
        "¿Qué animal hace miau?",
    ),
    Fact(
        ("100", "hundred", "cent degrés", "hundert", "一百", "cien"),
        "At how many degrees Celsius does water boil?",
        "À combien de degrés Celsius l'eau bout-elle ?",
        "Bei wie viel Grad Celsius kocht Wasser?",
        "水在多少摄氏度沸腾？",
        "¿A cuántos grados Celsius hierve el agua?",
    ),
    Fact(
        ("water", "eau", "Wasser", "水", "agua"),
        "What is H2O?",
        "Qu'est-ce que H2O ?",
        "Was ist H2O?",
        "H2O是什么？",
        "¿Qué es H2O?",
    ),
    Fact(
        ("heart", "cœur", "coeur", "Herz", "心", "corazón"),
        "Which organ pumps blood through the body?",
        "Quel organe pompe le sang dans le corps ?",
        "Welches Organ pumpt das Blut durch den Körper?",
        "哪个器官把血液输送到全身？",
        "¿Qué órgano bombea la sangre por el cuerpo?",
    ),
    Fact(
        ("Pacific", "Pacifique", "Pazifik", "Pazifische", "太平洋", "Pacífico"),
        "What is the largest ocean in the world?",
        "Quel est le plus grand océan du monde ?",
        "Was ist der größte Ozean der Welt?",
        "世界上最大的海洋是哪个？",
        "¿Cuál es el océano más grande del mundo?",
    ),
    Fact(
        ("Everest", "珠穆朗玛", "珠峰"),
        "What is the highest mountain in the world?",
        "Quelle est la plus haute montagne du monde ?",
        "Was ist der höchste Berg der Welt?",
        "世界上最高的山是哪座？",
        "¿Cuál es la montaña más alta del mundo?",
    ),
    Fact(
        ("Portuguese", "portugais", "Portugiesisch", "葡萄牙语", "portugués"),
        "Which language is spoken in Brazil?",
        "Quelle langue parle-t-on au Brésil ?",
        "Welche Sprache spricht man in Brasilien?",
        "巴西人说什么语言？",
        "¿Qué idioma se habla en Brasil?",
    ),
    Fact(
        ("yen", "日元", "日圆"),
        "What is the currency of Japan?",
        "Quelle est la monnaie du Japon ?",
        "Was ist die Währung von Japan?",
        "日本的货币是什么？",
        "¿Cuál es la moneda de Japón?",
    ),
    Fact(
        ("Shakespeare", "莎士比亚"),
        "Who wrote Romeo and Juliet?",
        "Qui a écrit Roméo et Juliette ?",
        "Wer hat Romeo und Julia geschrieben?",
        "《罗密欧与朱丽叶》是谁写的？",
        "¿Quién escribió Romeo y Julieta?",
    ),
    Fact(
        ("France", "Frankreich", "法国", "Francia"),
        "In which country is the Eiffel Tower?",
        "Dans quel pays se trouve la tour Eiffel ?",
        "In welchem Land steht der Eiffelturm?",
        "埃菲尔铁塔在哪个国家？",
        "¿En qué país está la torre Eiffel?",
    ),
    Fact(
        ("Einstein", "爱因斯坦"),
        "Who developed the theory of relativity?",
        "Qui a développé la théorie de la relativité ?",
        "Wer hat die Relativitätstheorie entwickelt?",
        "相对论是谁提出的？",
        "¿Quién desarrolló la teoría de la relatividad?",
    ),
    Fact(
        ("Leonardo", "Léonard", "达芬奇", "达·芬奇"),
        "Who painted the Mona Lisa?",
        "Qui a peint la Joconde ?",
        "Wer hat die Mona Lisa gemalt?",
        "《蒙娜丽莎》是谁画的？",
        "¿Quién pintó la Mona Lisa?",
    ),
    Fact(
        ("Nile", "le Nil", "der Nil", "尼罗河", "Nilo"),
        "What is the longest river in Africa?",
        "Quel est le plus long fleuve d'Afrique ?",
        "Was ist der längste Fluss Afrikas?",
        "非洲最长的河流是哪条？",
        "¿Cuál es el río más largo de África?",
    ),
)

# What its capital is called, and the country: in English, French (with "of"), German, Chinese,
# Spanish.
_CAPITALS = (
    ("Paris|巴黎|París", "France", "de la France", "Frankreich", "法国", "Francia"),
    ("Berlin|柏林|Berlín", "Germany", "de l'Allemagne", "Deutschland", "德国", "Alemania"),
    ("Rome|Rom|罗马|Roma", "Italy", "de l'Italie", "Italien", "意大利", "Italia"),
    ("Madrid|马德里", "Spain", "de l'Espagne", "Spanien", "西班牙", "España"),
    (
        "Lisbon|Lisbonne|Lissabon|里斯本|Lisboa",
        "Portugal",
        "du Portugal",
        "Portugal",
        "葡萄牙",
        "Portugal",
    ),
    ("Athens|Athènes|Athen|雅典|Atenas", "Greece", "de la Grèce", "Griechenland", "希腊", "Grecia"),
    ("Moscow|Moscou|Moskau|莫斯科|Moscú", "Russia", "de la Russie", "Russland", "俄罗斯", "Rusia"),
    ("Tokyo|Tokio|东京", "Japan", "du Japon", "Japan", "日本", "Japón"),
    ("Beijing|Peking|Pékin|北京|Pekín", "China", "de la Chine", "China", "中国", "China"),
    ("Cairo|Le Caire|Kairo|开罗|El Cairo", "Egypt", "de l'Égypte", "Ägypten", "埃及", "Egipto"),
    (
        "Warsaw|Varsovie|Warschau|华沙|Varsovia",
        "Poland",
        "de la Pologne",
        "Polen",
        "波兰",
        "Polonia",
    ),
    (
        "Vienna|Vienne|Wien|维也纳|Viena",
        "Austria",
        "de l'Autriche",
        "Österreich",
        "奥地利",
        "Austria",
    ),
    ("Stockholm|斯德哥尔摩|Estocolmo", "Sweden", "de la Suède", "Schweden", "瑞典", "Suecia"),
    ("Oslo|奥斯陆", "Norway", "de la Norvège", "Norwegen", "挪威", "Noruega"),
    ("Dublin|都柏林|Dublín", "Ireland", "de l'Irlande", "Irland", "爱尔兰", "Irlanda"),
    ("Havana|La Havane|Havanna|哈瓦那|La Habana", "Cuba", "de Cuba", "Kuba", "古巴", "Cuba"),
    ("Bangkok|曼谷", "Thailand", "de la Thaïlande", "Thailand", "泰国", "Tailandia"),
    ("Baghdad|Bagdad|巴格达", "Iraq", "de l'Irak", "Irak", "伊拉克", "Irak"),
    ("Budapest|布达佩斯", "Hungary", "de la Hongrie", "Ungarn", "匈牙利", "Hungría"),
    (
        "Seoul|Séoul|首尔|Seúl",
        "South Korea",
        "de la Corée du Sud",
        "Südkorea",
        "韩国",
        "Corea del Sur",
    ),
)
CAPITALS = tuple(
    Fact(
        tuple(accept.split("|")),
        f"What is the capital of {en}?",
        f"Quelle est la capitale {fr} ?",
        f"Was ist die Hauptstadt von {de}?",
        f"{zh}的首都是哪里？",
        f"¿Cuál es la capital de {es}?",
    )
    for accept, en, fr, de, zh, es in _CAPITALS
)
