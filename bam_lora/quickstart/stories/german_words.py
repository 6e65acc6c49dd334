"""Die Wörter der deutschen Geschichten: Tabellen mit Geschlecht (m, f, n, p für Mehrzahl) und zweitem Fall."""

from __future__ import annotations

from bam_lora.quickstart.stories.weave import table, words

GIRLS = words("Anna; Greta; Lina; Frieda; Marie; Paula; Klara; Ida; Lotte; Johanna; Hanna; Mathilda")
BOYS = words("Karl; Emil; Anton; Paul; Otto; Jakob; Konrad; Bruno; Oskar; Leo; Gustav; Theo")
KIN = table("""
    Großmutter; f; Großmutter
    Großvater; m; Großvaters
    Mutter; f; Mutter
    Vater; m; Vaters
    Tante; f; Tante
    Onkel; m; Onkels
""")
# Wohnort, als Adjektiv nur, was zu allen passt.
PLACES = table("""
    in; Dorf; n; Dorfes
    in; Haus; n; Hauses
    in; Hütte; f; Hütte
    in; Städtchen; n; Städtchens
    auf; Bauernhof; m; Bauernhofs
    in; Mühle; f; Mühle
    in; Forsthaus; n; Forsthauses
""")
PLACE_LOOKS = words("klein; alt; einsam; still; freundlich")
WHERE = words("""
    am Meer; am Fuß der Berge; am Rand des Waldes; an einem breiten Fluss; hinter den Hügeln; in der Nähe der Grenze
    mitten im Moor; zwischen zwei Seen; im Norden des Landes; oberhalb des Tals
""")
# Handwerker; zweiter Fall; Handwerkerin; Arbeitsplatz, Werkzeug, Ware (je mit Geschlecht, zweitem Fall); Nutzen.
TRADES = table("""
    Bäcker; Bäckers; Bäckerin; Backstube; f; Backstube; Schieber; m; Schiebers; Brot; n; Brotes; Essen
    Schmied; Schmieds; Schmiedin; Schmiede; f; Schmiede; Hammer; m; Hammers; Hufeisen; n; Hufeisens; Ware
    Tischler; Tischlers; Tischlerin; Werkstatt; f; Werkstatt; Säge; f; Säge; Stuhl; m; Stuhls; Ware
    Schneider; Schneiders; Schneiderin; Stube; f; Stube; Schere; f; Schere; Mantel; m; Mantels; Wärme
    Schuster; Schusters; Schusterin; Werkstatt; f; Werkstatt; Ahle; f; Ahle; Sattel; m; Sattels; Ware
    Gärtner; Gärtners; Gärtnerin; Garten; m; Gartens; Spaten; m; Spatens; Kürbis; m; Kürbisses; Essen
    Töpfer; Töpfers; Töpferin; Töpferei; f; Töpferei; Drehscheibe; f; Drehscheibe; Krug; m; Kruges; Ware
    Müller; Müllers; Müllerin; Mühle; f; Mühle; Sieb; n; Siebes; Sack Mehl; m; Sackes Mehl; Essen
    Weber; Webers; Weberin; Kammer; f; Kammer; Schiffchen; n; Schiffchens; Decke; f; Decke; Wärme
    Uhrmacher; Uhrmachers; Uhrmacherin; Laden; m; Ladens; Lupe; f; Lupe; Uhr; f; Uhr; Ware
    Fischer; Fischers; Fischerin; Hütte; f; Hütte; Netz; n; Netzes; Korb Fische; m; Korbes Fische; Essen
    Imker; Imkers; Imkerin; Garten; m; Gartens; Leiter; f; Leiter; Glas Honig; n; Glases Honig; Essen
    Koch; Kochs; Köchin; Küche; f; Küche; Kelle; f; Kelle; Topf Suppe; m; Topfes Suppe; Essen
    Bauer; Bauern; Bäuerin; Scheune; f; Scheune; Gabel; f; Gabel; Korb Eier; m; Korbes Eier; Essen
""")
# Tier; Geschlecht; zweiter Fall; Aussehen; Stimme; Gang; Futter; Zuhause: wo, wie, was; Größe.
ANIMALS = table("""
    Katze; f; Katze; jung; miaute; schlich; Milch; in; leer; Fass; n; Fasses; klein
    Krähe; f; Krähe; schwarz; krächzte; flog; Körner; in; hohl; Baum; m; Baumes; klein
    Eule; f; Eule; grau; rief; flog; Käse; in; alt; Turm; m; Turmes; klein
    Fuchs; m; Fuchses; rot; bellte; lief; Fleisch; unter; dicht; Hecke; f; Hecke; klein
    Igel; m; Igels; dick; schnaufte; lief; Äpfel; unter; groß; Laubhaufen; m; Laubhaufens; klein
    Eichhörnchen; n; Eichhörnchens; flink; keckerte; sprang; Nüsse; in; hohl; Baum; m; Baumes; klein
    Gans; f; Gans; weiß; schnatterte; watschelte; Hafer; in; dicht; Gebüsch; n; Gebüschs; klein
    Maus; f; Maus; winzig; piepste; huschte; Käse; hinter; alt; Schrank; m; Schrankes; klein
    Dachs; m; Dachses; scheu; brummte; lief; Beeren; in; tief; Höhle; f; Höhle; klein
    Ente; f; Ente; braun; quakte; watschelte; Brot; in; dicht; Gebüsch; n; Gebüschs; klein
    Hase; m; Hasen; mager; fiepte; hoppelte; Kohl; hinter; klein; Busch; m; Busches; klein
    Hund; m; Hundes; treu; bellte; lief; Fleisch; in; alt; Schuppen; m; Schuppens; groß
    Ziege; f; Ziege; weiß; meckerte; lief; Heu; hinter; kaputt; Karren; m; Karrens; groß
    Esel; m; Esels; störrisch; schrie; trabte; Möhren; in; leer; Stall; m; Stalles; groß
    Pony; n; Ponys; grau; wieherte; trabte; Hafer; in; leer; Stall; m; Stalles; groß
    Schaf; n; Schafes; wollig; blökte; trabte; Gras; hinter; niedrig; Mauer; f; Mauer; groß
    Kalb; n; Kalbes; gefleckt; muhte; trabte; Heu; in; offen; Scheune; f; Scheune; groß
""")
THINGS = table("""
    Laterne; f; Laterne
    Schlüssel; m; Schlüssels
    Ring; m; Ringes
    Hut; m; Hutes
    Schal; m; Schals
    Münze; f; Münze
    Buch; n; Buches
    Flöte; f; Flöte
    Trommel; f; Trommel
    Puppe; f; Puppe
    Glocke; f; Glocke
    Landkarte; f; Landkarte
    Beutel; m; Beutels
    Knopf; m; Knopfes
    Schirm; m; Schirms
    Pfeife; f; Pfeife
    Becher; m; Bechers
    Kästchen; n; Kästchens
    Spiegel; m; Spiegels
    Löffel; m; Löffels
    Fernrohr; n; Fernrohrs
    Armband; n; Armbands
    Tuch; n; Tuches
    Kreisel; m; Kreisels
""")
LOOKS = words("rot; blau; grün; gelb; alt; klein; hübsch; seltsam; bunt; schlicht; winzig; kostbar; fein; schön")
SPOTS = table("""
    unter; Brücke; f; Brücke
    hinter; Scheune; f; Scheune
    neben; Brunnen; m; Brunnens
    vor; Kirche; f; Kirche
    unter; Eiche; f; Eiche
    hinter; Mühle; f; Mühle
    an; Teich; m; Teiches
    neben; Zaun; m; Zauns
    auf; Wiese; f; Wiese
    in; Obstgarten; m; Obstgartens
    auf; Feld; n; Feldes
    an; Bach; m; Baches
    in; Wald; m; Waldes
""")
FOODS = words("""
    Pfannkuchen; Apfelkuchen; Erbsensuppe; Bratkartoffeln; Pflaumenkuchen; Brot mit Butter; Klöße; Spiegeleier
    Bratäpfel; Käsebrote; Eintopf; Grießbrei
""")
SKIES = {
    "Regen": [
        "An einem (Morgen|Nachmittag|Tag) im Herbst zogen dunkle Wolken auf, und es begann zu regnen.",
        "Seit (zwei|drei|vier) Tagen regnete es, und der (Weg|Hof) war (voller Pfützen|aufgeweicht).",
        "An diesem (Morgen|Abend) trommelte der Regen (auf das Dach|gegen die Scheiben), und niemand ging gern hinaus.",
    ],
    "Schnee": [
        "Es war Winter, und auf den (Dächern|Feldern|Straßen) lag (hoher|tiefer|frischer) Schnee.",
        "Eines kalten Morgens war der (Fluss|Teich) zugefroren, und dicke Flocken fielen vom Himmel.",
        "Im Januar drehte der Wind nach Norden, und in der Nacht fiel der erste Schnee.",
    ],
    "Wind": [
        "Eines Tages wehte ein starker Wind (von den Bergen|vom Meer) herüber und rüttelte an den (Türen|Fenstern).",
        "Es war ein stürmischer (Tag|Morgen) im März, und der Wind bog die (Bäume|Äste).",
        "Die ganze Nacht hatte der Sturm geheult, und am Morgen lagen überall (Äste|Blätter|Ziegel).",
    ],
    "Sonne": [
        "An einem (Morgen|Vormittag) im (Mai|Sommer) schien die Sonne warm auf die (Felder|Gärten|Dächer).",
        "Es war der heißeste Tag im Juli, und am Himmel stand keine einzige Wolke.",
        "An einem klaren (Sonntag|Montag|Freitag) im Juni roch die Luft nach (Heu|Blumen|Gras).",
    ],
    "Nebel": [
        "Eines (grauen|stillen) Morgens war der Nebel so dicht, dass man die (Kirche|Brücke|Straße) nicht mehr sah.",
        "Im (Oktober|November) stieg der Nebel aus dem (Fluss|Tal), und alle Geräusche klangen weit entfernt.",
        "Weißer Nebel (hing|lag) an jenem Tag über den Feldern, und noch am Mittag brannten die Lampen.",
    ],
}
