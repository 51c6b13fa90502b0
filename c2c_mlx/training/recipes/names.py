"""Short questions about places and things: a name decides what the answer is.

No question that `facts` measures with, or that the page of answers asks, is here.
"""

from __future__ import annotations

from typing import NamedTuple

from c2c_mlx.training.recipes.frames import Frame

HELD_OUT = 28  # one name of so many


class Name(NamedTuple):
    """What is asked about: in English, French (as the frames need it) and Chinese."""

    en: str
    fr: str
    zh: str


# The French name comes with "of".
OF_PLACES = (
    Frame("What is the capital of {}?", "Quelle est la capitale {} ?", "{}的首都是哪里？"),
    Frame("What language do people speak in {}?", "Quelle est la langue {} ?", "{}人说什么语言？"),
    Frame(
        "Which countries are next to {}?", "Quels sont les pays voisins {} ?", "{}的邻国有哪些？"
    ),
    Frame("Name a big city in {}.", "Cite une grande ville {}.", "说出{}的一座大城市。"),
    Frame("Tell me about {}.", "Parle-moi {}.", "给我介绍一下{}。"),
    Frame("What do people eat in {}?", "Que mangent les habitants {} ?", "{}人吃什么？"),
)
# The French name comes with "of" here, too.
OF_THINGS = (
    Frame("What is {}?", "Donne-moi la définition {}.", "什么是{}？"),
    Frame("Tell me something about {}.", "Parle-moi {}.", "跟我说说{}。"),
    Frame(
        "Explain to a child what {} is.",
        "Explique à un enfant le sens {}.",
        "给孩子解释一下什么是{}。",
    ),
    Frame("What is the use of {}?", "Quelle est l'utilité {} ?", "{}有什么用？"),
    Frame("Write one sentence about {}.", "Écris une phrase au sujet {}.", "写一句关于{}的话。"),
    Frame(
        "What comes to mind when you hear of {}?",
        "À quoi penses-tu au sujet {} ?",
        "说到{}，你会想到什么？",
    ),
)

_PLACES = """\
Argentina|de l'Argentine|阿根廷
Australia|de l'Australie|澳大利亚
Belgium|de la Belgique|比利时
Bolivia|de la Bolivie|玻利维亚
Bulgaria|de la Bulgarie|保加利亚
Cambodia|du Cambodge|柬埔寨
Canada|du Canada|加拿大
Chile|du Chili|智利
Colombia|de la Colombie|哥伦比亚
Croatia|de la Croatie|克罗地亚
the Czech Republic|de la République tchèque|捷克
Denmark|du Danemark|丹麦
Ecuador|de l'Équateur|厄瓜多尔
Ethiopia|de l'Éthiopie|埃塞俄比亚
Finland|de la Finlande|芬兰
Ghana|du Ghana|加纳
Iceland|de l'Islande|冰岛
India|de l'Inde|印度
Indonesia|de l'Indonésie|印度尼西亚
Iran|de l'Iran|伊朗
Israel|d'Israël|以色列
Jamaica|de la Jamaïque|牙买加
Jordan|de la Jordanie|约旦
Kenya|du Kenya|肯尼亚
Laos|du Laos|老挝
Lebanon|du Liban|黎巴嫩
Libya|de la Libye|利比亚
Madagascar|de Madagascar|马达加斯加
Malaysia|de la Malaisie|马来西亚
Mexico|du Mexique|墨西哥
Mongolia|de la Mongolie|蒙古
Morocco|du Maroc|摩洛哥
Nepal|du Népal|尼泊尔
the Netherlands|des Pays-Bas|荷兰
New Zealand|de la Nouvelle-Zélande|新西兰
Nigeria|du Nigeria|尼日利亚
Pakistan|du Pakistan|巴基斯坦
Peru|du Pérou|秘鲁
the Philippines|des Philippines|菲律宾
Romania|de la Roumanie|罗马尼亚
Saudi Arabia|de l'Arabie saoudite|沙特阿拉伯
Senegal|du Sénégal|塞内加尔
Singapore|de Singapour|新加坡
South Africa|de l'Afrique du Sud|南非
Sri Lanka|du Sri Lanka|斯里兰卡
Switzerland|de la Suisse|瑞士
Syria|de la Syrie|叙利亚
Tunisia|de la Tunisie|突尼斯
Turkey|de la Turquie|土耳其
Ukraine|de l'Ukraine|乌克兰
the United Kingdom|du Royaume-Uni|英国
the United States|des États-Unis|美国
Uruguay|de l'Uruguay|乌拉圭
Venezuela|du Venezuela|委内瑞拉
Vietnam|du Viêt Nam|越南
Zimbabwe|du Zimbabwe|津巴布韦
"""
_THINGS = """\
a bridge|d'un pont|桥
a camera|d'un appareil photo|照相机
a castle|d'un château|城堡
a cloud|d'un nuage|云
a computer|d'un ordinateur|电脑
a desert|d'un désert|沙漠
a dictionary|d'un dictionnaire|词典
a dragon|d'un dragon|龙
a farm|d'une ferme|农场
a fire|d'un feu|火
a forest|d'une forêt|森林
a fridge|d'un réfrigérateur|冰箱
a ghost|d'un fantôme|鬼
a guitar|d'une guitare|吉他
a hammer|d'un marteau|锤子
a hospital|d'un hôpital|医院
a hotel|d'un hôtel|酒店
a key|d'une clé|钥匙
a kitchen|d'une cuisine|厨房
a knife|d'un couteau|刀
a lamp|d'une lampe|灯
a law|d'une loi|法律
a letter|d'une lettre|信
a library|d'une bibliothèque|图书馆
a lion|d'un lion|狮子
a map|d'une carte|地图
a market|d'un marché|市场
a mirror|d'un miroir|镜子
a museum|d'un musée|博物馆
a newspaper|d'un journal|报纸
a nurse|d'une infirmière|护士
a piano|d'un piano|钢琴
a pilot|d'un pilote|飞行员
a pirate|d'un pirate|海盗
a prison|d'une prison|监狱
a river|d'une rivière|河流
a robot|d'un robot|机器人
a rocket|d'une fusée|火箭
a sheep|d'un mouton|绵羊
a snake|d'un serpent|蛇
a spider|d'une araignée|蜘蛛
a teacher|d'un professeur|老师
a telephone|d'un téléphone|电话
a tiger|d'un tigre|老虎
a train|d'un train|火车
a tree|d'un arbre|树
a volcano|d'un volcan|火山
a wedding|d'un mariage|婚礼
a wolf|d'un loup|狼
an airport|d'un aéroport|机场
an apple|d'une pomme|苹果
an artist|d'un artiste|艺术家
an earthquake|d'un tremblement de terre|地震
an elephant|d'un éléphant|大象
an engine|d'un moteur|发动机
an island|d'une île|岛
an umbrella|d'un parapluie|雨伞
art|de l'art|艺术
beer|de la bière|啤酒
bread|du pain|面包
butter|du beurre|黄油
cheese|du fromage|奶酪
chess|des échecs|国际象棋
chocolate|du chocolat|巧克力
coffee|du café|咖啡
cotton|du coton|棉花
dance|de la danse|舞蹈
democracy|de la démocratie|民主
electricity|de l'électricité|电
football|du football|足球
freedom|de la liberté|自由
friendship|de l'amitié|友谊
glass|du verre|玻璃
gold|de l'or|黄金
grammar|de la grammaire|语法
history|de l'histoire|历史
honey|du miel|蜂蜜
hunger|de la faim|饥饿
ice|de la glace|冰
iron|du fer|铁
love|de l'amour|爱情
mathematics|des mathématiques|数学
meat|de la viande|肉
medicine|de la médecine|医学
milk|du lait|牛奶
money|de l'argent|钱
music|de la musique|音乐
oil|du pétrole|石油
paper|du papier|纸
patience|de la patience|耐心
peace|de la paix|和平
poetry|de la poésie|诗歌
rain|de la pluie|雨
rice|du riz|大米
school|de l'école|学校
silk|de la soie|丝绸
snow|de la neige|雪
soap|du savon|肥皂
spring|du printemps|春天
sugar|du sucre|糖
swimming|de la natation|游泳
tea|du thé|茶
television|de la télévision|电视
the brain|du cerveau|大脑
the internet|de l'internet|互联网
the moon|de la lune|月亮
the sun|du soleil|太阳
thunder|du tonnerre|雷
time|du temps|时间
tobacco|du tabac|烟草
traffic|de la circulation|交通
war|de la guerre|战争
wheat|du blé|小麦
wind|du vent|风
wine|du vin|葡萄酒
winter|de l'hiver|冬天
wood|du bois|木头
work|du travail|工作
"""


def _names(table: str) -> tuple[Name, ...]:
    return tuple(Name(*line.split("|")) for line in table.splitlines())


PLACES, THINGS = _names(_PLACES), _names(_THINGS)


def asked(held_out: bool = False) -> list[tuple[str, str, str]]:
    """Every question: its language, as it is asked there, and its English twin.

    Args:
        held_out: those of the names that no run learns from, in place of all others.
    """
    return [
        (lang, getattr(frame, lang).format(getattr(name, lang)), frame.en.format(name.en))
        for some, names in ((OF_PLACES, PLACES), (OF_THINGS, THINGS))
        for n, name in enumerate(names)
        if (n % HELD_OUT == 0) == held_out
        for frame in some
        for lang in ("fr", "zh")
    ]
