"""Small tables of words and facts: what the generated tasks of the corpus are about. Data only."""

from __future__ import annotations

__all__ = ["CAPITALS", "LANGUAGE_NAMES", "WORDS"]

LANGUAGE_NAMES = {
    "en": "English",
    "de": "German",
    "fr": "French",
    "es": "Spanish",
    "ru": "Russian",
    "zh": "Chinese",
    "ja": "Japanese",
    "ko": "Korean",
}

_WORDS = """
one eins un uno один 一 一 하나
two zwei deux dos два 二 二 둘
three drei trois tres три 三 三 셋
four vier quatre cuatro четыре 四 四 넷
five fünf cinq cinco пять 五 五 다섯
six sechs six seis шесть 六 六 여섯
seven sieben sept siete семь 七 七 일곱
eight acht huit ocho восемь 八 八 여덟
nine neun neuf nueve девять 九 九 아홉
ten zehn dix diez десять 十 十 열
red rot rouge rojo красный 红 赤 빨강
blue blau bleu azul синий 蓝 青 파랑
green grün vert verde зелёный 绿 緑 초록
white weiß blanc blanco белый 白 白 하양
black schwarz noir negro чёрный 黑 黒 검정
yellow gelb jaune amarillo жёлтый 黄 黄色 노랑
Monday Montag lundi lunes понедельник 星期一 月曜日 월요일
Tuesday Dienstag mardi martes вторник 星期二 火曜日 화요일
Wednesday Mittwoch mercredi miércoles среда 星期三 水曜日 수요일
Thursday Donnerstag jeudi jueves четверг 星期四 木曜日 목요일
Friday Freitag vendredi viernes пятница 星期五 金曜日 금요일
Saturday Samstag samedi sábado суббота 星期六 土曜日 토요일
Sunday Sonntag dimanche domingo воскресенье 星期日 日曜日 일요일
water Wasser eau agua вода 水 水 물
bread Brot pain pan хлеб 面包 パン 빵
milk Milch lait leche молоко 牛奶 牛乳 우유
apple Apfel pomme manzana яблоко 苹果 りんご 사과
house Haus maison casa дом 房子 家 집
door Tür porte puerta дверь 门 ドア 문
window Fenster fenêtre ventana окно 窗户 窓 창문
table Tisch table mesa стол 桌子 机 탁자
chair Stuhl chaise silla стул 椅子 椅子 의자
book Buch livre libro книга 书 本 책
letter Brief lettre carta письмо 信 手紙 편지
file Datei fichier archivo файл 文件 ファイル 파일
user Benutzer utilisateur usuario пользователь 用户 ユーザー 사용자
network Netzwerk réseau red сеть 网络 ネットワーク 네트워크
key Schlüssel clé llave ключ 钥匙 鍵 열쇠
city Stadt ville ciudad город 城市 都市 도시
street Straße rue calle улица 街道 通り 거리
train Zug train tren поезд 火车 電車 기차
car Auto voiture coche машина 汽车 車 자동차
sun Sonne soleil sol солнце 太阳 太陽 태양
moon Mond lune luna луна 月亮 月 달
rain Regen pluie lluvia дождь 雨 雨 비
snow Schnee neige nieve снег 雪 雪 눈
tree Baum arbre árbol дерево 树 木 나무
flower Blume fleur flor цветок 花 花 꽃
dog Hund chien perro собака 狗 犬 개
cat Katze chat gato кошка 猫 猫 고양이
bird Vogel oiseau pájaro птица 鸟 鳥 새
fish Fisch poisson pez рыба 鱼 魚 물고기
mother Mutter mère madre мать 母亲 母 어머니
father Vater père padre отец 父亲 父 아버지
friend Freund ami amigo друг 朋友 友達 친구
child Kind enfant niño ребёнок 孩子 子供 아이
teacher Lehrer professeur profesor учитель 老师 先生 선생님
hand Hand main mano рука 手 手 손
head Kopf tête cabeza голова 头 頭 머리
heart Herz cœur corazón сердце 心 心 마음
day Tag jour día день 天 日 날
night Nacht nuit noche ночь 夜晚 夜 밤
year Jahr année año год 年 年 년
time Zeit temps tiempo время 时间 時間 시간
question Frage question pregunta вопрос 问题 質問 질문
answer Antwort réponse respuesta ответ 回答 答え 대답
name Name nom nombre имя 名字 名前 이름
music Musik musique música музыка 音乐 音楽 음악
"""

WORDS: tuple[dict[str, str], ...] = tuple(
    dict(zip(LANGUAGE_NAMES, line.split(), strict=True)) for line in _WORDS.strip().splitlines()
)
"""Concepts as `{language: word}`."""

CAPITALS: dict[str, str] = dict(
    pair.split(" = ")
    for pair in """France = Paris;Germany = Berlin;Spain = Madrid;Italy = Rome;Russia = Moscow
China = Beijing;Japan = Tokyo;South Korea = Seoul;Austria = Vienna;Poland = Warsaw
Portugal = Lisbon;Greece = Athens;Turkey = Ankara;Egypt = Cairo;Kenya = Nairobi
Norway = Oslo;Sweden = Stockholm;Finland = Helsinki;Denmark = Copenhagen;Ireland = Dublin
Hungary = Budapest;Romania = Bucharest;Bulgaria = Sofia;Ukraine = Kyiv;Belgium = Brussels
Netherlands = Amsterdam;Switzerland = Bern;Canada = Ottawa;Mexico = Mexico City;Cuba = Havana
Peru = Lima;Chile = Santiago;Brazil = Brasília;Argentina = Buenos Aires;Colombia = Bogotá
India = New Delhi;Nepal = Kathmandu;Thailand = Bangkok;Vietnam = Hanoi;Mongolia = Ulaanbaatar
Iran = Tehran;Iraq = Baghdad;Morocco = Rabat;Ghana = Accra;Ethiopia = Addis Ababa
Australia = Canberra;New Zealand = Wellington;Iceland = Reykjavík;Latvia = Riga;Estonia = Tallinn
""".replace("\n", ";")
    .strip(";")
    .split(";")
)
