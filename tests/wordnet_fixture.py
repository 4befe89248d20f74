"""A folder of WordNet for tests: entries of WordNet 3.0, each with its first two synsets, and their irregular forms."""

from __future__ import annotations

import pathlib

LICENCE = (
    "  1 This software and database is being provided to you, the LICENSEE, by  \n"
    "  10 WordNet 3.0 Copyright 2006 by Princeton University.  All rights reserved.  \n"
)

FILES = {  # part of speech -> (index, irregular forms)
    "noun": (
        """
'hood n 1 2 @ ; 1 0 08641944
abacus n 2 1 @ 2 0 02666347 02666196
asp n 2 2 @ #m 2 0 01752736 01748389
ass n 2 5 @ ~ #m #p ; 2 2 05559256 09813632
assay n 2 3 @ ~ + 2 1 05738625 14584390
ax n 1 4 @ ~ %p + 1 1 02764044
axis n 2 4 @ ~ %p + 2 1 06008609 13128771
be n 1 2 @ #s 1 0 14631295
best n 2 3 ! @ + 2 2 00127531 09851165
better n 2 3 @ ~ + 2 1 05143558 09851876
box n 2 7 @ ~ #m #p %s %p + 2 2 02883344 02884225
bus n 2 7 @ ~ #m #p %p + - 2 1 02924116 05730591
church n 2 8 @ ~ #p %m %p + ; - 2 2 08082602 03028079
dog n 2 5 @ ~ #m #p %p 2 1 02084071 10114209
dogma n 2 3 @ ~ + 2 1 06790042 05960464
e n 2 3 @ ~ #m 2 0 15092409 14636822
es n 1 1 @ 1 0 14636822
ese n 1 1 @ 1 0 13832599
feed n 1 3 @ ~ + 1 1 07800091
fish n 2 6 @ ~ #m %p + ; 2 2 02512053 07775375
glass n 2 6 @ ~ #s #p %p + 2 2 14881303 03438257
glasses n 1 5 @ ~ #p %p ; 1 1 04272054
good n 2 4 ! @ ~ = 2 2 05159725 04849241
goose n 2 6 @ ~ #m #p %p + 2 1 01855672 10157744
ice-cream_cone n 1 1 @ 1 0 07614730
kiss n 2 3 @ ~ + 2 1 00138221 07636869
leaf n 2 6 @ ~ #p %s %p + 2 1 13152742 06256229
leave n 2 3 @ ~ + 2 2 15139130 06690114
man n 2 10 ! @ ~ #m #p %m %p + ; - 2 2 10287213 10582746
men n 1 4 @ ~ %m %p 1 1 08212347
photograph n 1 3 @ ~ + 1 1 03925226
red n 2 4 @ ~ #p + 2 2 04962784 09405949
s n 2 7 @ ~ #m #s #p %p ; 2 0 15235126 14656219
singing n 2 4 @ ~ + - 2 1 00545501 06805297
ss n 2 3 @ #p %p 2 0 08348400 08211924
sss n 1 1 @ 1 0 08353563
well n 2 2 @ ~ 2 2 04572344 04572935
woman n 2 7 ! @ ~ #m %p + ; 2 2 10787470 10788852
""",
        """
abaci abacus
axes ax axis
geese goose
leaves leaf leave
men man
""",
    ),
    "verb": (
        """
assay v 2 3 @ ~ + 2 1 00694974 02530167
assess v 2 4 @ ~ $ + 2 1 00681429 02308552
be v 2 4 @ ~ $ + 2 2 02604760 02616386
best v 1 2 @ ~ 1 1 01109259
better v 2 6 ! @ ~ > $ + 2 2 01106864 00205885
box v 2 5 ! @ ~ + ; 2 1 01485158 01420765
discuss v 2 3 @ ~ + 2 2 01034312 00813978
dog v 1 2 @ ~ 1 1 02001858
fee v 1 1 @ 1 0 02202133
feed v 2 7 ! @ ~ > $ + ; 2 2 01182021 01178565
fish v 2 3 @ ~ + 2 2 01319346 01140794
gallop v 2 3 @ + ; 2 2 01959927 01960643
kiss v 2 3 @ ~ + 2 1 01431230 01431723
leave v 2 6 ! @ ~ * $ + 2 2 02009433 00613683
possess v 2 4 @ ~ $ + 2 2 02632167 02204692
run v 2 7 ! @ ~ ^ $ + ; 2 2 01926311 02075049
sing v 2 5 @ ~ $ + ; 2 2 01731031 01729431
singe v 2 2 @ + 2 1 00378521 00582743
well v 1 1 @ 1 1 01991204
""",
        """
feed feed fee
ran run
singing sing singe
were be
""",
    ),
    "adj": (
        """
best a 2 5 ! & ^ + ; 2 1 00227507 00067379
better a 2 3 ! & ; 2 2 00230335 00231761
deep a 2 5 ! & ^ = + 2 2 00692762 01873163
fast a 2 6 ! & ^ = + ; 2 1 00976508 00983573
good a 2 5 ! & ^ = + 2 2 01123148 00106020
less a 2 4 ! & ^ ; 2 1 01555416 02347371
red a 2 2 & + 2 2 00381097 00248560
small a 2 5 ! & = + ; 2 2 01391351 01415219
smaller a 1 1 & 1 1 01394922
well a 2 4 ! & ^ + 2 2 02540578 01048762
""",
        """
best good
better good well
redder red
""",
    ),
    "adv": (
        """
best r 2 0 2 2 00188137 00188057
better r 2 0 2 2 00059607 00509846
deeply r 2 1 \\ 2 2 00173353 00305570
fast r 2 0 2 2 00086000 00086404
less r 2 1 ! 2 2 00099527 00099868
quickly r 2 2 ! \\ 2 2 00085811 00105603
well r 2 2 ! ; 2 2 00011093 00012779
""",
        """
better well
deeper deeply
""",
    ),
}


def write_wordnet(folder: str | pathlib.Path) -> str:
    """The folder's path, with the eight files in it."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for part, (index, irregular) in FILES.items():
        lines = [f"{line}  \n" for line in index.split("\n") if line]
        (folder / f"index.{part}").write_text(LICENCE + "".join(lines))
        (folder / f"{part}.exc").write_text(irregular.lstrip("\n"))
    return str(folder)
