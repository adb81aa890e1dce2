package recording

import (
	"bytes"
	_ "embed"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"maps"
	"regexp"
	"slices"
	"strings"
)

// What is known to be harmless. Everything else is replaced.
var (
	//go:embed words.txt
	wordList string
	//go:embed numbers.txt
	numberList string

	harmless = listed(wordList, strings.ToLower)
	numbers  = listed(numberList, func(s string) string { return s })

	// free holds what people or their hosts write as they like. It goes whole.
	free = listed(`Caption Description ElementName ErrorDescription ErrorSummaryDescription ErrorMessage JobStatus Label
		LastKnownSwitchName Message MessageArguments Notes Owner OwningEntity PrimaryOwnerContact PrimaryOwnerName Reason
		RecommendedActions Status StatusDescriptions Text faultstring`, func(s string) string { return s })
	versions = listed("Version BuildNumber SystemVersion", func(s string) string { return s })
	// told are the keys of what a guest tells of itself that are the same for
	// all guests of a kind.
	told = listed(`IntegrationServicesVersion OSBuildNumber OSMajorVersion OSMinorVersion OSPlatformId OSVersion
		ProcessorArchitecture ProductType ServicePackMajor ServicePackMinor SuiteMask`, func(s string) string { return s })
	systems = listed(`windows server datacenter standard essentials pro professional enterprise evaluation debian ubuntu
		red hat fedora centos rocky almalinux suse linux gnu microsoft 10 11 2008 2012 2016 2019 2022 2025 r2`, strings.ToLower)

	numberText  = regexp.MustCompile(`^-?[0-9]{1,20}$`)
	timeText    = regexp.MustCompile(`^([0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:.]+(Z|[+-][0-9:]+)?|-?P[0-9.DTHMS]+|[0-9]{8,14}\.[0-9]{6}[:+-][0-9]{3})$`)
	smallText   = regexp.MustCompile(`^[0-9]{1,2}$`)
	versionText = regexp.MustCompile(`^[0-9]{1,5}(\.[0-9]{1,6}){0,3}$`)
	schema      = regexp.MustCompile(`^http://(schemas\.(microsoft\.com|dmtf\.org|xmlsoap\.org)|www\.w3\.org)/[A-Za-z0-9_/.*-]+$`)
	classText   = regexp.MustCompile(`^(Msvm|CIM|Win32|MSFT|MSCluster|cim)_[A-Za-z_]{1,80}$`)
	typeText    = regexp.MustCompile(`^[a-z0-9]{1,8}:((Msvm|CIM|Win32|MSFT|MSCluster)_[A-Za-z_]{1,80}|cim[A-Za-z]{1,20}|[A-Za-z]+_(OUTPUT|INPUT))$`)
	nameText    = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_.-]{0,80}$`)
	langText    = regexp.MustCompile(`^[a-z]{2}(-[A-Z]{2})?$`)
	faultText   = regexp.MustCompile(`^[a-z]{1,8}:[A-Za-z]{1,40}$`)
	guidText    = regexp.MustCompile(`^\{?` + guid + `\}?$`)
	resultText  = regexp.MustCompile(`^HRESULT 0x[0-9A-Fa-f]{8}$`)
	subTypeText = regexp.MustCompile(`^Microsoft:Hyper-V:SubType:[0-9]$`)
	macText     = regexp.MustCompile(`^[0-9A-Fa-f]{12}$`)

	piece = regexp.MustCompile(guid + `|[A-Za-z0-9_\x{80}-\x{10FFFF}]+`)
	// place follows the ids of a device: \0\1\D
	place = regexp.MustCompile(`^(\\{1,2}[0-9]{1,3}){0,4}(\\{1,2}[A-Z])?($|[^A-Za-z0-9_\\\x{80}-\x{10FFFF}])`)
)

const (
	guid     = `[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}`
	noMAC    = "000000000000"
	nobody   = "00000000-0000-0000-0000-000000000000"
	maxInner = 3  // of instances as text in instances
	maxDepth = 64 // of elements

	// faultCode is no name that an element can have.
	faultCode = "the value of a fault's code"
)

func listed(text string, as func(string) string) map[string]bool {
	out := map[string]bool{}
	for line := range strings.Lines(text) {
		if !strings.HasPrefix(line, "#") {
			for _, w := range strings.Fields(line) {
				out[as(w)] = true
			}
		}
	}
	return out
}

// Kinds of pseudonyms, each told by its form.
const (
	kindGUID   = "GUIDs"
	kindMAC    = "hardware addresses"
	kindNumber = "numbers"
	kindWord   = "words"
	kindText   = "texts"
)

var forms = map[string]string{
	kindGUID:   "%08d-0000-4000-8000-000000000000",
	kindMAC:    "02%010d",
	kindNumber: "9%06d",
	kindWord:   "word%05d",
	kindText:   "text%05d",
}

// Kinds are the kinds of what is replaced, in the order of how much they tell.
func Kinds() []string { return []string{kindText, kindWord, kindGUID, kindMAC, kindNumber} }

// A sanitiser replaces what may tell whose host it was. It is used twice on
// all that there is: before number it gathers, after it replaces.
type sanitiser struct {
	pseudonyms map[string]map[string]string // kind, original in lower case
	figures    []string                     // the originals of kindNumber, as they came
	stayed     map[string]bool              // words and versions
}

func newSanitiser() *sanitiser {
	s := &sanitiser{pseudonyms: map[string]map[string]string{}, stayed: map[string]bool{}}
	for kind := range forms {
		s.pseudonyms[kind] = map[string]string{}
	}
	return s
}

// number gives each original its pseudonym, in the order of the originals: who
// sorts what a host says asks in that order. Nobody sorts unknown numbers, whose
// order would tell about how large they are: they go as they came.
func (s *sanitiser) number() {
	for kind, all := range s.pseudonyms {
		originals := s.figures
		if kind != kindNumber {
			originals = slices.Sorted(maps.Keys(all))
		}
		for n, o := range originals {
			all[o] = fmt.Sprintf(forms[kind], n+1)
		}
	}
}

func (s *sanitiser) counts() map[string]int {
	out := map[string]int{}
	for kind, all := range s.pseudonyms {
		if len(all) > 0 {
			out[kind] = len(all)
		}
	}
	return out
}

func (s *sanitiser) replace(kind, original string) string {
	key := strings.ToLower(original)
	if kind == kindText {
		key = original
	}
	p, known := s.pseudonyms[kind][key]
	if !known && kind == kindNumber {
		s.figures = append(s.figures, key)
	}
	s.pseudonyms[kind][key] = p
	return p
}

// envelope gives an envelope without what has to go. What is no envelope, or
// has anything in it that cannot be judged, is an error.
func (s *sanitiser) envelope(text string) (string, error) {
	out, root, err := s.document([]byte(strings.TrimPrefix(text, "\ufeff")), 0)
	if err == nil && root != "Envelope" {
		err = fmt.Errorf("it is %q and no envelope", root)
	}
	return out, err
}

// An open element, and of which property or header its text is.
type open struct {
	name string // as it is written
	of   string
}

// passing are elements whose text is the value of the property around them.
var passing = listed("VALUE VALUE.ARRAY Datetime Interval Date Time", func(s string) string { return s })

// document rewrites XML: names and structure stay, values are judged. A guest's
// own words are judged by the key that they stand under.
func (s *sanitiser) document(data []byte, inner int) (out, root string, err error) {
	key := ""
	if inner > 0 {
		key = keyOf(data)
	}
	d := xml.NewDecoder(bytes.NewReader(data))
	var b strings.Builder
	var text strings.Builder
	var stack []open
	flush := func() {
		if t := text.String(); strings.TrimSpace(t) == "" {
			xml.EscapeText(&b, []byte(t))
		} else if len(stack) > 0 {
			xml.EscapeText(&b, []byte(s.judge(stack[len(stack)-1].of, t, key, inner)))
		}
		text.Reset()
	}
	for {
		tok, err := d.RawToken()
		if err == io.EOF {
			break
		}
		if err != nil {
			return "", "", err
		}
		switch tok := tok.(type) {
		case xml.StartElement:
			flush()
			if len(stack) == maxDepth {
				return "", "", errors.New("elements lie too deep")
			}
			e := open{name: qualified(tok.Name), of: tok.Name.Local}
			if passing[e.of] && len(stack) > 0 {
				e.of = stack[len(stack)-1].of
			}
			if len(stack) > 0 && e.of == "Value" && (stack[len(stack)-1].of == "Code" || stack[len(stack)-1].of == "Subcode") {
				e.of = faultCode
			}
			if root == "" {
				root = tok.Name.Local
			}
			b.WriteString("<" + e.name)
			for _, a := range tok.Attr {
				value, err := s.attribute(a, tok.Name.Local, &e)
				if err != nil {
					return "", "", err
				}
				b.WriteString(" " + qualified(a.Name) + `="`)
				xml.EscapeText(&b, []byte(value))
				b.WriteString(`"`)
			}
			b.WriteString(">")
			if !nameText.MatchString(tok.Name.Local) || tok.Name.Space != "" && !nameText.MatchString(tok.Name.Space) {
				return "", "", fmt.Errorf("%q is no name of an element", e.name)
			}
			stack = append(stack, e)
		case xml.EndElement:
			flush()
			if len(stack) == 0 || stack[len(stack)-1].name != qualified(tok.Name) {
				return "", "", errors.New("elements do not end as they begin")
			}
			b.WriteString("</" + qualified(tok.Name) + ">")
			stack = stack[:len(stack)-1]
		case xml.CharData:
			text.Write(tok) // a CDATA section is one more token of the same text
		case xml.Directive:
			return "", "", errors.New("it has a document type")
		} // comments and instructions go
	}
	if len(stack) > 0 || root == "" || strings.TrimSpace(text.String()) != "" {
		return "", "", errors.New("it does not end")
	}
	return b.String(), root, nil
}

func qualified(n xml.Name) string {
	if n.Space == "" {
		return n.Local
	}
	return n.Space + ":" + n.Local
}

// attribute judges the value of one, and learns from it what e is of.
func (s *sanitiser) attribute(a xml.Attr, element string, e *open) (string, error) {
	v := a.Value
	if !nameText.MatchString(a.Name.Local) || a.Name.Space != "" && !nameText.MatchString(a.Name.Space) {
		return "", fmt.Errorf("%q is no name of an attribute", qualified(a.Name))
	}
	switch name := a.Name.Local; {
	case name == "xmlns" || a.Name.Space == "xmlns":
		if v != "" && !schema.MatchString(v) {
			return "", errors.New("a namespace is none that is known")
		}
		return v, nil
	case (name == "Name" || name == "NAME") && slices.Contains([]string{"Selector", "Option", "PROPERTY", "PROPERTY.ARRAY", "PROPERTY.REFERENCE"}, element):
		if !nameText.MatchString(v) {
			return "", errors.New("a property has no name")
		}
		e.of = v
		return v, nil
	case (name == "CLASSNAME" || name == "CLASSORIGIN") && classText.MatchString(v),
		name == "TYPE" && harmlessType(v), name == "PROPAGATED" && (v == "true" || v == "false"),
		name == "lang" && langText.MatchString(v), name == "type" && typeText.MatchString(v),
		name == "mustUnderstand" && smallText.MatchString(v), name == "Code" && numberText.MatchString(v):
		return v, nil
	}
	return s.judge(a.Name.Local, v, "", maxInner), nil
}

func harmlessType(v string) bool {
	return slices.Contains([]string{"string", "boolean", "datetime", "reference", "char16"}, v) || regexp.MustCompile(`^([us]int(8|16|32|64)|real(32|64))$`).MatchString(v)
}

// judge gives a value as it may be shown: itself if it is known to be harmless.
// of is the property, parameter or header, key that of a guest's own word.
func (s *sanitiser) judge(of, text, key string, inner int) string {
	t := strings.TrimSpace(text)
	switch {
	case t == "":
		return text
	case strings.EqualFold(t, "true") || strings.EqualFold(t, "false"):
		return t
	case numbers[of] && (numberText.MatchString(t) || timeText.MatchString(t)),
		(of == "Address" || of == "AddressOnParent") && smallText.MatchString(t),
		of == "MessageID" && resultText.MatchString(t),
		of == "VirtualSystemSubType" && subTypeText.MatchString(t), // a VM's generation
		schema.MatchString(t):
		return t
	case versions[of] && versionText.MatchString(t),
		of == faultCode && faultText.MatchString(t),
		strings.HasSuffix(of, "CreationClassName") && classText.MatchString(t),
		of == "Data" && told[key] && versionText.MatchString(t):
		s.stayed[t] = true
		return t
	case of == "Data" && key == "OSName":
		return s.pieces(t, systems)
	case free[of]:
		return s.replace(kindText, text)
	case strings.HasPrefix(t, "<") && inner < maxInner:
		if out, _, err := s.document([]byte(t), inner+1); err == nil {
			return out
		}
		return s.replace(kindText, text)
	}
	return s.pieces(text, harmless)
}

// pieces judges a value word by word, so that paths and references keep their
// form, and one word is the same in all of them.
func (s *sanitiser) pieces(text string, known map[string]bool) string {
	var b strings.Builder
	for text != "" {
		at := piece.FindStringIndex(text)
		if at == nil {
			b.WriteString(text)
			break
		}
		b.WriteString(text[:at[0]])
		before, word, rest := text[:at[0]], text[at[0]:at[1]], text[at[1]:]
		text = rest
		switch {
		case word == nobody, word == noMAC, known[strings.ToLower(word)]:
			s.stayed[word] = true
			b.WriteString(word)
		case guidText.MatchString(word):
			b.WriteString(s.replace(kindGUID, word))
			if m := place.FindStringSubmatchIndex(rest); m != nil {
				b.WriteString(rest[:m[6]])
				text = rest[m[6]:]
			}
		case len(word) == 1 && strings.HasPrefix(rest, `:\`) && (before == "" || strings.HasSuffix(before, `\`)):
			b.WriteString(word) // a drive
		case macText.MatchString(word):
			b.WriteString(s.replace(kindMAC, word))
		case strings.Trim(word, "0123456789") == "":
			b.WriteString(s.replace(kindNumber, word))
		default:
			b.WriteString(s.replace(kindWord, word))
		}
	}
	return b.String()
}

// keyOf is the property Name of an instance in CIM-XML, if it has one.
func keyOf(data []byte) string {
	var in struct {
		Properties []struct {
			Name  string `xml:"NAME,attr"`
			Value string `xml:"VALUE"`
		} `xml:"PROPERTY"`
	}
	if xml.Unmarshal(data, &in) == nil {
		for _, p := range in.Properties {
			if p.Name == "Name" {
				return strings.TrimSpace(p.Value)
			}
		}
	}
	return ""
}
