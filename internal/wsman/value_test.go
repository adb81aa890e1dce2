package wsman

import (
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/backstay/backstay/internal/fault"
)

// An instance as a host of today writes it: every kind of property.
const oneOfEach = `<x:Msvm_X xmlns:x="` + r2 + `Msvm_X" xmlns:i="http://www.w3.org/2001/XMLSchema-instance" xmlns:c="http://schemas.dmtf.org/wbem/wscim/1/common" xmlns:a="http://schemas.xmlsoap.org/ws/2004/08/addressing" xmlns:w="http://schemas.dmtf.org/wbem/wsman/1/wsman.xsd" xmlns:q="` + r2 + `Msvm_Y" i:type="x:Msvm_X_Type">` +
	`<x:Text>  two words &amp; </x:Text><x:Empty/><x:Nothing i:nil="true"/><x:Small> 7 </x:Small><x:Big>18446744073709551615</x:Big><x:Minus>-3</x:Minus><x:Half>0.5</x:Half><x:Yes>TRUE</x:Yes>` +
	`<x:List>a</x:List><x:Other>1</x:Other><x:List>b</x:List><x:Numbers>1</x:Numbers><x:Numbers>2</x:Numbers><x:Gap>1</x:Gap><x:Gap i:nil="true"/>` +
	`<x:When><c:Datetime>2026-01-02T03:04:05.25+01:00</c:Datetime></x:When><x:Long><c:Interval>P1DT2H3M4.5S</c:Interval></x:Long>` +
	`<x:Job><a:Address>http://x</a:Address><a:ReferenceParameters><w:ResourceURI>` + r2 + `Msvm_ConcreteJob</w:ResourceURI><w:SelectorSet><w:Selector Name="InstanceID">J</w:Selector></w:SelectorSet></a:ReferenceParameters></x:Job>` +
	`<x:Link><a:EndpointReference><a:Address>http://x</a:Address><a:ReferenceParameters><w:ResourceURI>` + r2 + `A</w:ResourceURI><w:SelectorSet><w:Selector Name="Antecedent"><a:EndpointReference><a:ReferenceParameters><w:ResourceURI>` + r2 + `B</w:ResourceURI></a:ReferenceParameters></a:EndpointReference></w:Selector></w:SelectorSet></a:ReferenceParameters></a:EndpointReference></x:Link>` +
	`<x:Path>root/virtualization/v2:A.K="a\\b"</x:Path>` +
	`<x:Inner i:type="q:Msvm_Y_Type"><q:N>5</q:N></x:Inner><x:Error>&lt;INSTANCE CLASSNAME="Msvm_Error"&gt;&lt;PROPERTY NAME="Message" TYPE="string"&gt;&lt;VALUE&gt;no&lt;/VALUE&gt;&lt;/PROPERTY&gt;&lt;/INSTANCE&gt;</x:Error></x:Msvm_X>`

func decoded(t testing.TB, s string) *Instance {
	t.Helper()
	e, err := parseXML([]byte(s))
	if err != nil {
		t.Fatal(err)
	}
	in, err := decodeObject(e)
	if err != nil {
		t.Fatal(err)
	}
	return in
}

func is[T Scalar](t *testing.T, in *Instance, name string, want ...T) {
	t.Helper()
	got, err := Props[T](in, name)
	if err != nil || len(got) != len(want) || len(want) > 0 && !reflect.DeepEqual(got, want) {
		t.Errorf("%s is %v (%v), not %v", name, got, err, want)
	}
}

func TestPropertiesOfEveryKind(t *testing.T) {
	in := decoded(t, oneOfEach)
	is(t, in, "Text", "  two words & ")
	is(t, in, "text", "  two words & ") // whatever the case
	is(t, in, "Empty", "")
	is[string](t, in, "Nothing")
	is[string](t, in, "Missing")
	is(t, in, "Small", uint8(7))
	is(t, in, "Big", uint64(1<<64-1))
	is(t, in, "Minus", int32(-3))
	is(t, in, "Half", 0.5)
	is(t, in, "Yes", true)
	is(t, in, "List", "a", "b")
	is(t, in, "Numbers", uint64(1), uint64(2))
	is(t, in, "Long", 26*time.Hour+3*time.Minute+4500*time.Millisecond)
	is(t, in, "Job", Ref{Namespace: "root/virtualization/v2", Class: "Msvm_ConcreteJob", Keys: []Key{{Name: "InstanceID", Value: "J"}}})
	is(t, in, "Job", `root/virtualization/v2:Msvm_ConcreteJob.InstanceID="J"`)
	is(t, in, "Path", Ref{Namespace: "root/virtualization/v2", Class: "A", Keys: []Key{{Name: "K", Value: `a\b`}}})
	if when, err := Prop[time.Time](in, "When"); err != nil || when.UTC().Format(time.RFC3339Nano) != "2026-01-02T02:04:05.25Z" {
		t.Errorf("When: %v, %v", when, err)
	}
	if link, err := Prop[Ref](in, "Link"); err != nil || len(link.Keys) != 1 || link.Keys[0].Ref == nil || link.Keys[0].Ref.Class != "B" {
		t.Errorf("Link: %+v, %v", link, err)
	}
	inner, err := Prop[*Instance](in, "Inner")
	if err != nil || inner.Class != "Msvm_Y" {
		t.Fatalf("Inner: %+v, %v", inner, err)
	}
	is(t, inner, "N", uint16(5))
	text, err := Prop[*Instance](in, "Error")
	if err != nil || text.Class != "Msvm_Error" {
		t.Fatalf("Error: %+v, %v", text, err)
	}
	is(t, text, "Message", "no")
	if in.Has("Nothing") || in.Has("Missing") || !in.Has("Empty") || !in.Has("List") {
		t.Error("Has is wrong")
	}
	if v, err := PropOr(in, "Nothing", uint16(9)); v != 9 || err != nil {
		t.Errorf("PropOr of null: %v, %v", v, err)
	}
	if names := in.Names(); names[0] != "Text" || len(names) != 19 {
		t.Errorf("names %v", names)
	}
}

func TestPropertiesThatAreNotAsAskedFor(t *testing.T) {
	in := decoded(t, oneOfEach)
	for _, tc := range []struct {
		name string
		err  error
		want string
	}{
		{"missing", second(Prop[string](in, "Missing")), "property Msvm_X.Missing: no value"},
		{"null", second(Prop[string](in, "Nothing")), "property Msvm_X.Nothing: no value"},
		{"several", second(Prop[string](in, "List")), "property Msvm_X.List: it has 2 values"},
		{"a null among them", second(Props[uint8](in, "Gap")), "property Msvm_X.Gap: value 2 of 2: no value"},
		{"text as a number", second(Prop[uint8](in, "Text")), `property Msvm_X.Text: "  two words & " is no uint8`},
		{"too large", second(Prop[uint32](in, "Big")), `property Msvm_X.Big: "18446744073709551615" is no uint32`},
		{"negative", second(Prop[uint64](in, "Minus")), `property Msvm_X.Minus: "-3" is no uint64`},
		{"a reference as a number", second(Prop[uint64](in, "Job")), `a reference to Msvm_ConcreteJob is no uint64`},
		{"an instance as text", second(Prop[string](in, "Inner")), `it is an embedded Msvm_Y, not text`},
		{"text as an instance", second(Prop[*Instance](in, "Text")), `is no CIM-XML`},
		{"text as a reference", second(Prop[Ref](in, "Text")), `that is no class`},
		{"number with a default", second(PropOr(in, "Text", uint8(1))), `is no uint8`},
		{"text as a truth", second(Prop[bool](in, "Small")), `is no bool`},
		{"text as a time", second(Prop[time.Time](in, "Long")), `is no time.Time`},
	} {
		var pe *PropertyError
		if tc.err == nil || !errors.As(tc.err, &pe) || !strings.Contains(tc.err.Error(), tc.want) {
			t.Errorf("%s: %v", tc.name, tc.err)
		}
	}
}

func TestEmbeddedInstanceToTheByte(t *testing.T) {
	in := NewInstance("Msvm_X").Set("B", Of(true)).Set("U8", Of(uint8(1))).Set("S64", Of(int64(-1))).Set("R", Of(1.5)).Set("Text", Of("a<b>&\"c\" ]]>\r\n")).
		Set("Time", Of(time.Date(2026, 1, 2, 3, 4, 5, 6000, time.FixedZone("", 3600)))).Set("Interval", Of(49*time.Hour+time.Second)).
		Set("Numbers", List(uint16(1), uint16(2))).Set("None", List[string]()).Set("Nothing", Null()).Set("b", Of(false))
	got, err := in.MarshalText()
	want := `<INSTANCE CLASSNAME="Msvm_X"><PROPERTY NAME="B" TYPE="boolean"><VALUE>false</VALUE></PROPERTY><PROPERTY NAME="U8" TYPE="uint8"><VALUE>1</VALUE></PROPERTY><PROPERTY NAME="S64" TYPE="sint64"><VALUE>-1</VALUE></PROPERTY>` +
		`<PROPERTY NAME="R" TYPE="real64"><VALUE>1.5</VALUE></PROPERTY><PROPERTY NAME="Text" TYPE="string"><VALUE>a&lt;b&gt;&amp;&#34;c&#34; ]]&gt;&#xD;&#xA;</VALUE></PROPERTY>` +
		`<PROPERTY NAME="Time" TYPE="datetime"><VALUE>20260102020405.000006+000</VALUE></PROPERTY><PROPERTY NAME="Interval" TYPE="datetime"><VALUE>00000002010001.000000:000</VALUE></PROPERTY>` +
		`<PROPERTY.ARRAY NAME="Numbers" TYPE="uint16"><VALUE.ARRAY><VALUE>1</VALUE><VALUE>2</VALUE></VALUE.ARRAY></PROPERTY.ARRAY><PROPERTY.ARRAY NAME="None" TYPE="string"><VALUE.ARRAY></VALUE.ARRAY></PROPERTY.ARRAY></INSTANCE>`
	if err != nil || string(got) != want {
		t.Errorf("%v\n%s\nnot\n%s", err, got, want)
	}
	for name, v := range map[string]Value{"reference": Of(NewRef("X")), "instance": Of(NewInstance("X"))} {
		if _, err := NewInstance("C").Set("P", v).MarshalText(); !errors.Is(err, fault.ErrUnsupported) {
			t.Errorf("%s within: %v", name, err)
		}
	}
	// What an envelope brings has no type; it must not get a wrong one.
	v, _ := decoded(t, oneOfEach).Value("Small")
	if _, err := NewInstance("C").Set("P", v).MarshalText(); err == nil {
		t.Error("a property of unknown type is written")
	}
	when, _ := decoded(t, oneOfEach).Value("When")
	if b, err := NewInstance("C").Set("P", when).MarshalText(); err != nil || !strings.Contains(string(b), ">20260102020405.250000+000<") {
		t.Errorf("a time from an envelope: %s, %v", b, err)
	}
}

// CDATA cannot hold its own end, so it is split there.
func TestCDATAIsSplit(t *testing.T) {
	var w writer
	w.raw("<a>")
	w.cdata("x]]>y]]>")
	w.raw("</a>")
	e, err := parseXML(w.Bytes())
	if err != nil || e.text != "x]]>y]]>" {
		t.Errorf("%s: %v", w.Bytes(), err)
	}
}

// As GetErrorEx and the key-value pairs of a guest come.
func TestInstancesAsHostsWriteThem(t *testing.T) {
	in, err := ParseInstance(`<?xml version="1.0"?><INSTANCE CLASSNAME="Msvm_Error"><QUALIFIER NAME="x" TYPE="string"><VALUE>q</VALUE></QUALIFIER>` +
		`<PROPERTY NAME="Caption" PROPAGATED="true" TYPE="string"></PROPERTY><PROPERTY NAME="ErrorType" TYPE="uint16"><VALUE>4</VALUE></PROPERTY>` +
		`<PROPERTY.ARRAY NAME="MessageArguments" TYPE="string"><VALUE.ARRAY><VALUE>web01</VALUE><VALUE.NULL/></VALUE.ARRAY></PROPERTY.ARRAY>` +
		`<PROPERTY.ARRAY NAME="Empty" TYPE="string"></PROPERTY.ARRAY>` +
		`<PROPERTY.OBJECT NAME="Inner"><VALUE.OBJECT><INSTANCE CLASSNAME="In"><PROPERTY NAME="N" TYPE="uint8"><VALUE>1</VALUE></PROPERTY></INSTANCE></VALUE.OBJECT></PROPERTY.OBJECT>` +
		`<PROPERTY.REFERENCE NAME="R" REFERENCECLASS="C"><VALUE.REFERENCE><INSTANCEPATH><NAMESPACEPATH><HOST>HV01</HOST><LOCALNAMESPACEPATH><NAMESPACE NAME="root"/><NAMESPACE NAME="v2"/></LOCALNAMESPACEPATH></NAMESPACEPATH><INSTANCENAME CLASSNAME="C"><KEYBINDING NAME="K"><KEYVALUE VALUETYPE="string">v</KEYVALUE></KEYBINDING></INSTANCENAME></INSTANCEPATH></VALUE.REFERENCE></PROPERTY.REFERENCE></INSTANCE>`)
	if err != nil {
		t.Fatal(err)
	}
	is(t, in, "ErrorType", uint16(4))
	is[string](t, in, "Caption")
	is[string](t, in, "Empty")
	is(t, in, "R", Ref{Namespace: "root/v2", Class: "C", Keys: []Key{{Name: "K", Value: "v"}}})
	if inner, err := Prop[*Instance](in, "Inner"); err != nil || inner.Class != "In" {
		t.Errorf("%v, %v", inner, err)
	}
	if v, ok := in.Value("MessageArguments"); !ok || v.Len() != 2 {
		t.Errorf("arguments %v", v)
	}
	for name, bad := range map[string]string{
		"empty": "", "no XML": "a problem", "another element": "<CLASS NAME='x'/>", "no class": "<INSTANCE/>", "cut off": `<INSTANCE CLASSNAME="C"><PROPERTY`,
		"no name": `<INSTANCE CLASSNAME="C"><PROPERTY TYPE="string"/></INSTANCE>`, "bad reference": `<INSTANCE CLASSNAME="C"><PROPERTY.REFERENCE NAME="R"><VALUE.REFERENCE/></PROPERTY.REFERENCE></INSTANCE>`,
		"document type": `<!DOCTYPE x><INSTANCE CLASSNAME="C"/>`,
	} {
		if in, err := ParseInstance(bad); err == nil {
			t.Errorf("%s is %+v", name, in)
		}
	}
}

func TestTimesOfBothForms(t *testing.T) {
	for s, want := range map[string]string{
		"20260102030405.000000+060": "2026-01-02T02:04:05Z", "20260102030405.250000-060": "2026-01-02T04:04:05.25Z", "2026-01-02T03:04:05Z": "2026-01-02T03:04:05Z",
		"2026-01-02T03:04:05.1234567+01:00": "2026-01-02T02:04:05.1234567Z", "2026-01-02T03:04:05": "2026-01-02T03:04:05Z",
	} {
		if got, err := parseTime(s); err != nil || got.UTC().Format(time.RFC3339Nano) != want {
			t.Errorf("%s is %v, %v", s, got, err)
		}
	}
	for s, want := range map[string]time.Duration{
		"00000001020304.000005:000": 26*time.Hour + 3*time.Minute + 4*time.Second + 5*time.Microsecond, "P0DT0H1M40S": 100 * time.Second, "PT0.5S": time.Second / 2, "P2D": 48 * time.Hour, "P0DT0S": 0,
	} {
		if got, err := parseInterval(s); err != nil || got != want {
			t.Errorf("%s is %v, %v", s, got, err)
		}
	}
	for _, s := range []string{"", "P", "PT", "P1DT", "1D", "PT1", "PT1S1M", "P1M", "PT-1S", "P1e30D", "PTNaNS", "99999999000000.000000:000", "0000000102030x.000000:000"} {
		if got, err := parseInterval(s); err == nil {
			t.Errorf("%q is %v", s, got)
		}
	}
}

func TestObjectPaths(t *testing.T) {
	for path, want := range map[string]Ref{
		`\\HV01\root\virtualization\v2:Msvm_ComputerSystem.CreationClassName="Msvm_ComputerSystem",Name="A"`: {Namespace: "root/virtualization/v2", Class: "Msvm_ComputerSystem", Keys: []Key{{Name: "CreationClassName", Value: "Msvm_ComputerSystem"}, {Name: "Name", Value: "A"}}},
		`//HV01/root/v2:C.K="a:b\\c\"d,e=f"`: {Namespace: "root/v2", Class: "C", Keys: []Key{{Name: "K", Value: `a:b\c"d,e=f`}}},
		`C`:                                  {Class: "C"},
		`root/v2:C=@`:                        {Namespace: "root/v2", Class: "C"},
		`C.Index=7,Yes=TRUE`:                 {Class: "C", Keys: []Key{{Name: "Index", Value: "7"}, {Name: "Yes", Value: "TRUE"}}},
		`C.K=""`:                             {Class: "C", Keys: []Key{{Name: "K"}}},
	} {
		if got, err := ParseRef(path); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s is %+v, %v", path, got, err)
		}
	}
	for _, bad := range []string{"", ".", ":C", "a b", `C.`, `C.K`, `C.K=`, `C.K="a`, `C.K="a\`, `C.K="a"x`, `C.K="a",`, `C.K="a",K="b"`, `C="a"`, `root/../x:C`, `\\HV01:C`, `C.1="a"`, `C.K=a"b`} {
		if got, err := ParseRef(bad); err == nil {
			t.Errorf("%q is %+v", bad, got)
		}
	}
	a, b := NewRef("C", "A", "x", "B", `y\z`), Ref{Namespace: "root/v2", Class: "c", Keys: []Key{{Name: "b", Value: `Y\Z`}, {Name: "a", Value: "X"}}}
	if !a.Equal(b) || a.Equal(NewRef("C", "A", "x")) || a.Equal(NewRef("C", "A", "x", "B", "q")) || b.Equal(Ref{Namespace: "root/v3", Class: "C", Keys: b.Keys}) {
		t.Error("Equal is wrong")
	}
	if a.Key("b") != `y\z` || a.Path() != `C.A="x",B="y\\z"` || fmt.Sprint(b) != `root/v2:c.b="Y\\Z",a="X"` {
		t.Errorf("%s, %s", a.Path(), b)
	}
}

// Whatever a key holds, its object path says it back.
func TestObjectPathsSayBackWhatTheyWereGiven(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		name := rapid.StringMatching(`[A-Za-z_][A-Za-z0-9_]{0,8}`)
		r := Ref{Class: name.Draw(t, "class")}
		if rapid.Bool().Draw(t, "has namespace") {
			r.Namespace = "root/" + name.Draw(t, "namespace")
		}
		for i := range rapid.IntRange(0, 3).Draw(t, "keys") {
			r.Keys = append(r.Keys, Key{Name: fmt.Sprint(name.Draw(t, "key"), i), Value: rapid.String().Draw(t, "value")})
		}
		if got, err := ParseRef(r.String()); err != nil || !reflect.DeepEqual(got, r) {
			t.Fatalf("%s is %+v (%v), not %+v", r, got, err, r)
		}
	})
}

// Whatever text a property holds, CIM-XML inside of a request's CDATA brings
// it over, or refuses it.
func TestTextSurvivesBothLayers(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := rapid.OneOf(rapid.String(), rapid.StringMatching(`[\]>&<\r\n\t a]{0,12}`)).Draw(t, "text")
		var w writer
		w.raw(`<M xmlns:xsi="x" xmlns:p="y">`)
		w.argument("A", Of(NewInstance("C").Set("P", List(s, s))), "root/v2")
		w.raw("</M>")
		if w.err != nil {
			return // a character that XML cannot hold
		}
		e, err := parseXML(w.Bytes())
		if err != nil {
			t.Fatal(err)
		}
		m, err := decodeObject(e)
		if err != nil {
			t.Fatal(err)
		}
		in, err := Prop[*Instance](m, "A")
		if err != nil {
			t.Fatal(err)
		}
		if got, err := Props[string](in, "P"); err != nil || len(got) != 2 || got[0] != s || got[1] != s {
			t.Fatalf("%q comes as %q, %v", s, got, err)
		}
	})
}

// Text that stands before and after elements is kept, however deep they lie.
func TestTextBetweenElements(t *testing.T) {
	e, err := parseXML([]byte("<a>1<b>2<c>3<d>4<e>5</e>6</d>7</c>8</b>9</a>"))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"19", "28", "37", "46", "5"} {
		if e.text != want {
			t.Errorf("%s has %q, want %q", e.name, e.text, want)
		}
		if len(e.children) > 0 {
			e = e.children[0]
		}
	}
}
