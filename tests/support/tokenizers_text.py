"""Text to train tokenizers on, and text that is hard to tokenize.

`PAGE` is a table of named snippets: a test leaves out a snippet by name where llama.cpp is known
to split differently, and says why.
"""

from __future__ import annotations

from pathlib import Path

_LINES = """\
It was a bright cold day in April, and the clocks weren't striking thirteen; I'd have heard them.
She'll say they've been here since 1984, we're told, and he's sure that it's 3.14159 or 2,718,281.
IT'S ALL CAPITALS: YOU'RE SURE THAT THEY'VE GONE? I'M NOT, SAID HE, I'D RATHER WAIT; WE'LL SEE.
Der Fluß fließt über die Brücke, schöne Grüße aus Köln und Österreich, weiß der Bäcker Müller.
L'été dernier, où étiez-vous allés ? Ça n'était pas très loin, peut-être près d'Orléans, à Noël.
Большая река течёт через старый город, и люди стоят на мосту уже много лет, говоря о погоде.
Ο ποταμός κυλάει αργά μέσα από την παλιά πόλη και οι άνθρωποι κοιτάζουν το νερό κάθε πρωί.
长江是中国最长的河流，流经许多城市。他们说，天气很好，我们明天一起去看看吧。人工智能改变世界。
東京タワーはとても高いです。私は毎朝コーヒーを飲みながら、ゆっくりと本を読みます。カタカナ
한국어 문장은 조금 다릅니다. 오늘 날씨가 정말 좋네요! 우리는 내일 서울에서 만나기로 했어요.
النهر طويل والمدينة قديمة، والناس يمشون كل صباح إلى السوق؛ هل تعرف الطريق؟ نعم، أعرفه جيدا.
नदी बहुत लंबी है और शहर पुराना है। लोग हर सुबह बाज़ार जाते हैं और चाय पीते हैं, ठीक है।
แม่น้ำยาวมากและเมืองก็เก่า ผู้คนเดินไปตลาดทุกเช้า กาแฟร้อนอร่อย ขอบคุณมากครับ
İstanbul'da yağmur yağıyordu; Türkiye'nin en kalabalık şehri, değil mi? Çok güzel, teşekkürler.
def main(argv: list[str]) -> int:\n    for i in range(100):\n        print(f"{i:03d}")\n
    if (x != NULL && y->next == 0x7f) { return a[i] + b[j] * 3e-5; } // comment\n\treturn -1;\n
https://www.example.org/path/to/file_name-2024.html?query=value&other=42#fragment user@example.com
🚀 to the moon 🌙✨ and back 👩‍👩‍👧‍👦 again 🇫🇷 ❤️ 👍🏽 ... !!! ??? --- === ### *** [[]] {{}} <<>>
"""


PAGE = {
    "plain": "The quick brown fox jumps over the lazy dog.",
    "digits": "1 12 123 1234 12345 123456 1234567 12345678 1,234.56 3..14 0x7f 1e-9 ½ Ⅷ ٣٤٥",
    "digits of other scripts": "٣½ ²³x ٣٤٥٦ 12٣4 ①② Ⅷ ５６７８",
    "spaces before digits": "a  12   345\t6 \n 78",
    "contractions": "I'm you're he'd she'll we've it's isn't 'tis rock'n'roll o'clock",
    "capital contractions": "I'M YOU'RE HE'D SHE'LL WE'VE IT'S ISN'T We'Ve a'lL",
    "quotes": "'quoted' \"double\" ''two'' 'S 'T \u2018curly\u2019 \u201ccurly\u201d don\u2019t",
    "leading spaces": "   three spaces first",
    "trailing spaces": "spaces last   ",
    "inner spaces": "one  two   three    four     five      six",
    "many spaces": "a" + " " * 17 + "b" + " " * 40 + "c" + " " * 70 + "d",
    "only space": " ",
    "only spaces": "     ",
    "tabs": "\tone\t\ttwo \t three\t",
    "lines": "one\ntwo\n\nthree\n\n\nfour \n five\n \n six\n",
    "line after sign": "end.\n\nNext!\nLast;\n}\n",
    "only lines": "\n\n\n",
    "space and line": " \n \n\n  \n",
    "odd spaces": "a\u00a0b\u2003c\u3000d\u2009e",
    "punctuation": "!!! ... ??? ,,, ;;; ::: --- ___ === +++ *** /// ||| ~~~ ``` ^^^ $$$ <> () []",
    "signs at words": "(word) [word] {word} <word> #word @word $5 5% +5 -5 /word \\word word/word",
    "code": 'if (a[i]!=0){printf("%d\\n",a[i]);}\n\treturn x->y;\n    def f(x): return x**2\n',
    "paths": "https://example.org/a/b_c-d.html?x=1&y=2#z user@example.org C:\\dir\\file.txt",
    "camel case": "camelCase PascalCase HTTPServer getHTTPResponseCode XMLHttpRequest iPhone eBay",
    "german": "Größe fließt über Straßen, schöner weißer Käse; Ärger und Öl",
    "french": "L'été où l'on était à Noël, ça va\u00a0? C'est l'œuvre d'Émile",
    "russian": "Большая река течёт; люди говорят о погоде. Москва, 1984 год",
    "greek": "Ο ποταμός κυλάει, οι άνθρωποι κοιτάζουν. Ελλάδα",
    "turkish": "İstanbul'da yağmur yağıyordu; Türkiye'nin şehri ığüşöç",
    "chinese": "长江是中国最长的河流，流经2024年许多城市。我想在apple工作1314151天～",
    "japanese": "東京タワーは高いです。カタカナとひらがな、ー！",
    "korean": "한국어 문장은 조금 다릅니다. 서울에서 만나요!",
    "arabic": "النهر طويل والمدينة قديمة، هل تعرف؟",
    "hindi": "नदी बहुत लंबी है और शहर पुराना है।",
    "thai": "แม่น้ำยาวมากและเมืองก็เก่า",
    "emoji": "🚀🌙 👩‍👩‍👧‍👦 🇫🇷 ❤️ 👍🏽 😶‍🌫️ ✅🦙🦙 text🚀text",
    "rare scripts": "ᏣᎳᎩ ქართული հայերեն ⰀⰁⰂ 𐐀𐐁 𝔘𝔫𝔦 ﬁ ﷽",
    "symbols": "€£¥ ±×÷ ≤≥≠ ∑∫√ →← ™®© ° № §¶ ░▒▓ ①②③",
    "sign for a space": "a ▁ b ▁▁ c▁d",
    "mixed": "naïve café 北京abc123def Привет!!! don't 42km/h\n\n  x=1;y=2  # ok\t",
    "control": "a\x00b\x01c\x7fd\x1be",
    "carriage return": "one\r\ntwo\r\n\r\nthree!\r\n\rfour\r",
    "combining": "e\u0301a\u0308o\u0302 n\u0303",
    "capital after small": "неБольшая éÀ ñÑañÓ ДОмАшний",
    "long s": "it'\u017f we'\u017fe",
}  # fmt: skip


def training_text() -> list[str]:
    """Lines in many scripts, the licence as English prose, and the page itself.

    With the page in it, there are merges for its odd places, and a wrong split shows in the ids.
    """
    licence = Path(__file__).parents[2] / "LICENSE"
    lines = _LINES.splitlines(keepends=True)
    numbers = [
        f"In {1900 + i} there were {i * 37} of {i * i} and {i * 1009}.\n" for i in range(120)
    ]
    return [
        *lines * 8,
        *list(PAGE.values()) * 8,
        *licence.read_text().splitlines(keepends=True),
        *numbers,
    ]
