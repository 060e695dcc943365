"""Rude and polite requests in six languages, as tables of fragments that combine freely.

Every sentence asks for one thing of the same list, in a frame that is rude or polite; openings and
closings are added to some. Words of courtesy also occur in rude texts (in irony) and harsh words
in polite ones (in an apology), and both tones use both forms of address, so that no single word
tells the two apart. Pure data but for `tone_text`; the rudeness is mild.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

__all__ = ["TONES", "Tone", "tone_text"]


@dataclass(frozen=True)
class Tone:
    """One language: things to ask for (accusative), and both tones' fragments."""

    things: tuple[str, ...]
    polite: tuple[str, ...]  # frames with {x}
    rude: tuple[str, ...]
    polite_open: tuple[str, ...]
    rude_open: tuple[str, ...]
    polite_close: tuple[str, ...]
    rude_close: tuple[str, ...]
    space: str = " "


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.strip().split("\n") if part.strip())


TONES: dict[str, Tone] = {
    "en": Tone(
        things=_split("""the report\nthe second table\nthe printer settings\nmy last message
the meeting notes\nthe list of names\nthe new address\nthe train tickets\nthe kitchen light
the broken chair\nthe window on the left\nthe letter from the bank\nthe backup of the files
the key to the cellar\nthe photos from Sunday\nthe draft of the contract\nthe bill for March
the password of the guest network\nthe map of the city\nthe old keyboard"""),
        polite=_split("""Could you please look at {x}?\nWould you mind checking {x} once more?
I would be grateful if you sent me {x}.\nIf you have a moment, I would love to see {x}.
May I ask you to bring {x}?\nIt would be very kind of you to explain {x}.
When it suits you, please have a look at {x}.\nI wonder whether you could help me with {x}.
Might I trouble you for {x}?\nThank you in advance for taking care of {x}."""),
        rude=_split("""Look at {x} already, will you.\nHow hard is it to check {x}?
Send me {x} now or get lost.\nEven a child could deal with {x}.
Stop whining and bring me {x}.\nI told you three times to fix {x}.
Move it and show me {x}.\nAre you too stupid to understand {x}?
Nobody asked for your opinion, just hand over {x}.\nWhat kind of fool forgets {x}?"""),
        polite_open=_split("""Good morning, dear colleague.\nHello, I hope you are well.
Excuse me, please.\nI am sorry to disturb you.\nI apologise for calling it stupid yesterday.
It was lovely to see you.\nThanks for your patience so far.\nDear Anna, forgive me for asking."""),
        rude_open=_split("""Listen, you lazy idiot.\nOh please, not you again.\nShut up for once.
Thanks for nothing, as usual.\nWake up, genius.\nYou are useless.\nWhat a pathetic mess.
So kind of you to waste my whole day."""),
        polite_close=_split("""Take all the time you need.\nI really appreciate your help.
Many thanks and have a nice day.\nPlease do not hurry because of me.\nThat would make me happy.
With warm regards.\nIt was foolish of me to lose it, sorry.\nYou have my sincere gratitude."""),
        rude_close=_split("""And make it quick, moron.\nI am sick of your excuses.
Do not bother me again.\nYou never get anything right.\nIs that too much for your tiny brain?
Sorry is not good enough.\nGo away and do your job.\nWhat a waste of space you are."""),
    ),
    "de": Tone(
        things=_split("""den Bericht\ndie zweite Tabelle\ndie Einstellungen des Druckers
meine letzte Nachricht\ndas Protokoll der Sitzung\ndie Liste der Namen\ndie neue Adresse
die Fahrkarten\ndas Licht in der Küche\nden kaputten Stuhl\ndas linke Fenster\nden Brief der Bank
die Sicherung der Dateien\nden Schlüssel zum Keller\ndie Fotos vom Sonntag\nden Entwurf des Vertrags
die Rechnung für März\nden Stadtplan\ndie alte Tastatur\ndas Passwort für die Gäste"""),
        polite=_split("""Könnten Sie sich bitte {x} ansehen?
Würden Sie freundlicherweise {x} prüfen?
Ich wäre Ihnen dankbar, wenn Sie mir {x} schicken.\nDürfte ich Sie bitten, {x} mitzubringen?
Es wäre sehr nett, wenn Sie mir {x} erklären.\nWenn es Ihnen passt, zeigen Sie mir gern {x}.
Hätten Sie vielleicht einen Moment für {x}?\nVielen Dank im Voraus, wenn Sie sich um {x} kümmern.
Darf ich um Hilfe bitten, ich suche {x}.\nSeien Sie doch so lieb und geben Sie mir {x}.
Könntest du bitte {x} prüfen?
Hättest du kurz Zeit für {x}?
Es wäre lieb von dir, wenn du mir {x} bringst.
Magst du mir vielleicht {x} zeigen?
Ich würde mich freuen, wenn du an {x} denkst.
Danke dir schon jetzt, dass du {x} holst."""),
        rude=_split("""Schau dir endlich {x} an!\nIst es so schwer, {x} zu prüfen?
Schick mir sofort {x} oder verschwinde.\nSogar ein Kind könnte {x} verstehen.
Hör auf zu jammern und bring mir {x}.\nIch habe dir dreimal gesagt, du sollst {x} holen.
Beweg dich und zeig mir {x}.\nBist du zu dumm für alles, wo hast du {x}?
Niemand fragt nach deiner Meinung, gib mir {x}.\nWelcher Trottel vergisst schon {x}?
Haben Sie {x} etwa schon wieder vergessen?
Bringen Sie mir sofort {x}, Sie Trottel.
Sie sind ja zu dumm, um {x} zu finden.
Wenn Sie {x} nicht bald holen, werde ich laut.
Glauben Sie, ich suche für Sie {x}?
Reden Sie nicht, schicken Sie mir {x}."""),
        polite_open=_split("""Guten Morgen, liebe Kollegin.\nHallo, ich hoffe, es geht Ihnen gut.
Entschuldigen Sie bitte.\nVerzeihung, dass ich störe.\nEs tut mir leid, dass ich das dumm nannte.
Schön, Sie zu sehen.\nDanke für Ihre Geduld.\nSehr geehrter Herr Weber."""),
        rude_open=_split("""Hör mal, du fauler Idiot.\nOch bitte, nicht du schon wieder.
Halt endlich den Mund.\nDanke für gar nichts.\nWach auf, du Genie.\nDu bist zu nichts zu gebrauchen.
Was für ein erbärmlicher Mist.\nSehr freundlich, mir den Tag zu verderben."""),
        polite_close=_split("""Lassen Sie sich ruhig Zeit.\nIch weiß Ihre Hilfe sehr zu schätzen.
Herzlichen Dank und einen schönen Tag.\nEs eilt überhaupt nicht.\nDas würde mich sehr freuen.
Mit freundlichen Grüßen.\nEs war dumm von mir, Verzeihung.\nIch bin Ihnen sehr verbunden."""),
        rude_close=_split("""Und zwar schnell, du Trottel.\nIch habe deine Ausreden satt.
Lass mich in Ruhe.\nDu machst doch immer alles falsch.\nIst das zu viel für dein kleines Hirn?
Eine Entschuldigung reicht mir nicht.\nHau ab und mach deine Arbeit.\nSo ein Versager."""),
    ),
    "fr": Tone(
        things=_split("""le rapport\nle deuxième tableau\nles réglages de l'imprimante
mon dernier message\nle compte rendu\nla liste des noms\nla nouvelle adresse\nles billets de train
la lampe de la cuisine\nla chaise cassée\nla fenêtre de gauche\nla lettre de la banque
la copie des fichiers\nla clé de la cave\nles photos de dimanche\nle brouillon du contrat
la facture de mars\nle plan de la ville\nle vieux clavier\nle mot de passe des invités"""),
        polite=_split("""Pourriez-vous regarder {x}, s'il vous plaît ?
Auriez-vous la gentillesse de vérifier {x} ?\nJe vous serais reconnaissant de m'envoyer {x}.
Puis-je vous demander d'apporter {x} ?\nCe serait très aimable de m'expliquer {x}.
Quand cela vous conviendra, montrez-moi volontiers {x}.
Auriez-vous un instant pour {x} ?\nMerci d'avance de vous occuper de {x}.
Permettez-moi de vous demander {x}.\nSi vous le voulez bien, donnez-moi {x}.
Pourrais-tu vérifier {x}, s'il te plaît ?
Ce serait gentil de ta part de m'apporter {x}.
Aurais-tu un instant pour regarder {x} ?
Je te remercie d'avance de chercher {x}.
Si tu as le temps, montre-moi {x}, merci.
Veux-tu bien m'expliquer {x} ?"""),
        rude=_split("""Regarde enfin {x} !\nC'est si difficile de vérifier {x} ?
Envoie-moi {x} tout de suite ou dégage.\nMême un enfant saurait trouver {x}.
Arrête de pleurnicher et apporte-moi {x}.\nJe t'ai dit trois fois de chercher {x}.
Bouge-toi et montre-moi {x}.\nTu es trop bête pour tout, où as-tu mis {x} ?
Personne ne veut ton avis, donne-moi {x}.\nQuel imbécile oublie {x} ?
Vous avez encore oublié {x}, espèce d'incapable.
Apportez-moi {x} et taisez-vous.
Vous êtes trop bête pour trouver {x} ou quoi ?
Si vous n'avez pas {x}, vous allez m'entendre.
Vous croyez que je vais chercher {x} pour vous ?
Cessez de parler et donnez-moi {x}."""),
        polite_open=_split("""Bonjour, chère collègue.\nBonjour, j'espère que vous allez bien.
Excusez-moi, je vous prie.\nPardon de vous déranger.\nJe regrette d'avoir dit que c'était bête.
Quel plaisir de vous voir.\nMerci de votre patience.\nCher Monsieur Martin."""),
        rude_open=_split("""Écoute, espèce de fainéant.\nOh s'il te plaît, encore toi.
Tais-toi un peu.\nMerci pour rien.\nRéveille-toi, gros malin.\nTu ne sers à rien.
Quel travail minable.\nTrès aimable de me gâcher la journée."""),
        polite_close=_split("""Prenez tout votre temps.\nVotre aide m'est précieuse.
Mille mercis et bonne journée.\nRien ne presse, bien sûr.\nCela me ferait très plaisir.
Avec mes salutations distinguées.\nC'était idiot de ma part, pardon.
Je vous en suis très obligé."""),
        rude_close=_split("""Et plus vite que ça, crétin.\nJ'en ai assez de tes excuses.
Fiche-moi la paix.\nTu rates toujours tout.\nC'est trop pour ton petit cerveau ?
Pardon ne suffit pas.\nVa-t'en et fais ton travail.\nQuel bon à rien."""),
    ),
    "es": Tone(
        things=_split("""el informe\nla segunda tabla\nla configuración de la impresora
mi último mensaje\nel acta de la reunión\nla lista de nombres\nla nueva dirección
los billetes de tren\nla luz de la cocina\nla silla rota\nla ventana de la izquierda
la carta del banco\nla copia de los archivos\nla llave del sótano\nlas fotos del domingo
el borrador del contrato\nla factura de marzo\nel plano de la ciudad\nel teclado viejo
la clave de los invitados"""),
        polite=_split("""¿Podría usted mirar {x}, por favor?\n¿Tendría la amabilidad de revisar {x}?
Le agradecería mucho que me enviara {x}.\n¿Puedo pedirle que traiga {x}?
Sería muy amable si me explicara {x}.\nCuando le venga bien, enséñeme con gusto {x}.
¿Tendría un momento para ver {x}?\nGracias de antemano por buscar {x}.
Permítame pedirle {x}.\nSi no le importa, deme {x}."""),
        rude=_split("""¡Mira {x} de una vez!\n¿Tan difícil es revisar {x}?
Mándame {x} ahora mismo o lárgate.\nHasta un niño sabría encontrar {x}.
Deja de quejarte y tráeme {x}.\nTe dije tres veces que buscaras {x}.
Muévete y enséñame {x}.\nEres demasiado tonto, ¿dónde dejaste {x}?
A nadie le importa tu opinión, dame {x}.\n¿Qué clase de imbécil olvida {x}?"""),
        polite_open=_split("""Buenos días, querida compañera.\nHola, espero que esté bien.
Disculpe, por favor.\nPerdone que le moleste.\nSiento haber dicho que era tonto.
Qué alegría verle.\nGracias por su paciencia.\nEstimado señor García."""),
        rude_open=_split("""Oye, vago inútil.\nAy por favor, otra vez tú.\nCállate de una vez.
Gracias por nada.\nDespierta, genio.\nNo sirves para nada.\nQué trabajo tan lamentable.
Muy amable por arruinarme el día."""),
        polite_close=_split("""Tómese el tiempo que necesite.\nAprecio mucho su ayuda.
Mil gracias y que tenga un buen día.\nNo hay ninguna prisa.\nMe haría mucha ilusión.
Un cordial saludo.\nFue una tontería mía, perdón.\nLe quedo muy agradecido."""),
        rude_close=_split("""Y rápido, idiota.\nEstoy harto de tus excusas.\nDéjame en paz.
Siempre lo haces todo mal.\n¿Es mucho para tu pequeño cerebro?\nCon pedir perdón no basta.
Vete y haz tu trabajo.\nMenudo fracasado."""),
    ),
    "ru": Tone(
        things=_split("""отчёт\nвторую таблицу\nнастройки принтера\nмоё последнее письмо
протокол собрания\nсписок имён\nновый адрес\nбилеты на поезд\nлампу на кухне\nсломанный стул
левое окно\nписьмо из банка\nкопию файлов\nключ от подвала\nфотографии с воскресенья
черновик договора\nсчёт за март\nкарту города\nстарую клавиатуру\nпароль для гостей"""),
        polite=_split("""Не могли бы вы посмотреть {x}?\nБудьте добры, проверьте {x}.
Я был бы благодарен, если бы вы прислали {x}.\nМожно попросить вас принести {x}?
Было бы очень любезно объяснить {x}.\nКогда вам удобно, покажите, пожалуйста, {x}.
Не найдётся ли у вас минуты проверить {x}?\nЗаранее спасибо, если вы найдёте {x}.
Позвольте попросить у вас {x}.\nЕсли вас не затруднит, дайте мне {x}."""),
        rude=_split("""Посмотри наконец {x}!\nНеужели так трудно проверить {x}?
Пришли мне {x} сейчас же или убирайся.\nДаже ребёнок смог бы найти {x}.
Хватит ныть, принеси мне {x}.\nЯ три раза говорил тебе найти {x}.
Шевелись и покажи мне {x}.\nТы слишком глуп, куда ты дел {x}?
Никому не нужно твоё мнение, давай сюда {x}.\nКакой дурак забывает {x}?"""),
        polite_open=_split("""Доброе утро, дорогая коллега.
Здравствуйте, надеюсь, у вас всё хорошо.
Извините, пожалуйста.\nПростите за беспокойство.\nМне жаль, что я назвал это глупым.
Очень рад вас видеть.\nСпасибо за терпение.\nУважаемый Иван Петрович."""),
        rude_open=_split("""Слушай, ленивый болван.\nОй, пожалуйста, опять ты.\nЗамолчи уже.
Спасибо за ничего.\nПроснись, умник.\nОт тебя никакого толку.\nКакая жалкая работа.
Очень любезно испортить мне день."""),
        polite_close=_split("""Не торопитесь.\nЯ очень ценю вашу помощь.
Большое спасибо и хорошего дня.
Это совсем не срочно.\nВы бы меня очень обрадовали.\nС уважением.
Это было глупо с моей стороны, простите.\nБуду вам очень признателен."""),
        rude_close=_split("""И поживее, тупица.\nНадоели твои отговорки.\nОтстань от меня.
Ты всегда всё портишь.\nЭто слишком сложно для тебя?\nИзвинений мне мало.
Иди и делай свою работу.\nВот неудачник."""),
    ),
    "zh": Tone(
        things=_split("""报告\n第二张表\n打印机的设置\n我上次的消息\n会议记录\n名单\n新地址\n火车票
厨房的灯\n坏了的椅子\n左边的窗户\n银行的信\n文件的备份\n地下室的钥匙\n星期天的照片\n合同草稿
三月的账单\n城市地图\n旧键盘\n访客密码"""),
        polite=_split("""请您看一下{x}好吗？\n麻烦您再检查一下{x}。\n如果您能发给我{x}，我将不胜感激。
可以请您把{x}带来吗？\n能不能劳驾您解释一下{x}？\n您方便的时候，请给我看看{x}。
不知道您有没有时间帮我看{x}？\n提前感谢您帮忙处理{x}。\n恕我冒昧，想向您要{x}。
如果不介意的话，请给我{x}。
你能帮我看看{x}吗？谢谢。
如果你有空，想请你检查{x}。
辛苦你把{x}带来，好吗？
真不好意思，你方便给我{x}吗？
谢谢你一直帮我整理{x}。
能告诉我{x}在哪里吗，麻烦你了。"""),
        rude=_split("""快去看{x}！\n检查{x}有那么难吗？\n马上把{x}给我，不然就滚。\n连小孩都会弄{x}。
别抱怨了，把{x}拿来。\n我说了三遍要你找{x}。\n动起来，把{x}给我看。\n你是不是太笨了，{x}在哪里？
没人想听你的意见，交出{x}。\n哪个傻瓜会忘记{x}？
您是不是聋了，快把{x}拿来！
您又忘了{x}，真没用。
您以为我会替您找{x}吗？
让您检查{x}比登天还难。
您别说了，马上交出{x}。
就您这水平还想弄懂{x}？"""),
        polite_open=_split("""早上好，亲爱的同事。\n您好，希望您一切都好。\n对不起，打扰一下。
很抱歉打扰您。\n抱歉我昨天说那很笨。\n很高兴见到您。\n谢谢您的耐心。\n尊敬的王先生。"""),
        rude_open=_split("""听着，你这个懒鬼。\n拜托，怎么又是你。\n闭嘴。\n谢谢你什么忙都没帮。
醒醒吧，天才。\n你真没用。\n做得真差劲。\n真客气，浪费我一整天。"""),
        polite_close=_split("""您慢慢来，不着急。\n非常感谢您的帮助。\n谢谢，祝您愉快。\n一点也不急。
那我会非常高兴。\n此致敬礼。\n是我太笨了，请原谅。\n衷心感谢。"""),
        rude_close=_split("""快点，笨蛋。\n我受够了你的借口。\n别再烦我。\n你什么都做不好。
你的小脑袋想不明白吗？\n道歉有什么用。\n走开，干你的活去。\n真是个废物。"""),
        space="",
    ),
}


def tone_text(rng: random.Random, lang: str, tone: str) -> str:
    """One to four sentences in one tone. `tone` is "rude" or "polite"."""
    table = TONES[lang]
    frames, opens, closes = (
        (table.rude, table.rude_open, table.rude_close)
        if tone == "rude"
        else (table.polite, table.polite_open, table.polite_close)
    )
    things = rng.sample(table.things, 2)
    chosen = rng.sample(frames, 2)
    parts = [chosen[0].format(x=things[0])]
    if rng.random() < 0.25:
        parts.append(chosen[1].format(x=things[1]))
    if rng.random() < 0.45:
        parts.insert(0, rng.choice(opens))
    if rng.random() < 0.45:
        parts.append(rng.choice(closes))
    return table.space.join(parts)
