package wsman

import (
	"strings"
	"testing"
)

// Envelopes come from whoever answers. Whatever they hold, reading one must
// not panic, and what was read can be asked for anything.
func FuzzEnvelope(f *testing.F) {
	a := &asked{id: "uuid:1"}
	for _, body := range []string{oneOfEach, vm("x"), faultBody("w:AccessDenied", wsmanFault(5, "no")), "", `<wsen:PullResponse><wsen:Items>` + vm("a") + vm("b") + `</wsen:Items></wsen:PullResponse>`} {
		f.Add([]byte(soap(a, body).body))
	}
	f.Add([]byte("<a><b"))
	f.Add([]byte(soap(a, "text<i>in<b>text<u/></b></i>").body))
	f.Fuzz(func(t *testing.T, data []byte) {
		e, err := readEnvelope(data, "uuid:1", 200)
		if err != nil && (e != nil || err.Error() == "" || len(err.Error()) > 2000 && !strings.Contains(err.Error(), "XML")) {
			t.Errorf("%v with %v", err, e)
		}
		if e == nil {
			return
		}
		readEndpoint(e)
		in, err := decodeObject(e)
		if err != nil {
			return
		}
		askAll(t, in, 0)
	})
}

func askAll(t *testing.T, in *Instance, depth int) {
	for _, name := range in.Names() {
		Props[string](in, name)
		Props[uint64](in, name)
		Props[Ref](in, name)
		v, ok := in.Value(name)
		if !ok || in.Has(name) != (v.Len() > 0) {
			t.Errorf("%s is there: %v, with %d values", name, ok, v.Len())
		}
		if all, err := Props[*Instance](in, name); err == nil && depth < 8 {
			for _, x := range all {
				askAll(t, x, depth+1)
			}
		}
	}
}

// What is read from CIM-XML and can be written is read the same again.
func FuzzParseInstance(f *testing.F) {
	text, _ := NewInstance("C").Set("A", Of("x")).Set("B", List(uint8(1), uint8(2))).Set("T", Of(true)).MarshalText()
	f.Add(string(text))
	f.Add(`<INSTANCE CLASSNAME="C"><PROPERTY.OBJECT NAME="I"><VALUE.OBJECT><INSTANCE CLASSNAME="D"/></VALUE.OBJECT></PROPERTY.OBJECT></INSTANCE>`)
	f.Fuzz(func(t *testing.T, s string) {
		in, err := ParseInstance(s)
		if err != nil {
			return
		}
		askAll(t, in, 0)
		text, err := in.MarshalText()
		if err != nil {
			return
		}
		again, err := ParseInstance(string(text))
		if err != nil {
			t.Fatalf("%s from %q: %v", text, s, err)
		}
		second, err := again.MarshalText()
		if err != nil || string(second) != string(text) {
			t.Errorf("%s becomes %s, %v", text, second, err)
		}
	})
}

// A sealed answer's parts are what it says, and lie in it.
func FuzzSealed(f *testing.F) {
	good := "--Encrypted Boundary\r\n\tContent-Type: application/HTTP-SPNEGO-session-encrypted\r\n\tOriginalContent: type=application/soap+xml;charset=UTF-8;Length=4\r\n--Encrypted Boundary\r\n\tContent-Type: application/octet-stream\r\n\x10\x00\x00\x000123456789abcdefDATA--Encrypted Boundary--\r\n"
	f.Add(sealedType, []byte(good))
	f.Add(sealedType, []byte(strings.Replace(good, "Length=4", "Length=99999999999", 1)))
	f.Add(sealedType, []byte(strings.Replace(good, "Length=4", "Length=-1", 1)))
	f.Add("multipart/encrypted", []byte(good))
	f.Fuzz(func(t *testing.T, contentType string, body []byte) {
		signature, sealed, err := splitSealed(contentType, body)
		if err == nil && !strings.Contains(string(body), string(signature[:])+string(sealed)+"--") {
			t.Errorf("%q, %q are not in %q", signature, sealed, body)
		}
	})
}

// An object path that is read says itself back.
func FuzzParseRef(f *testing.F) {
	f.Add(`\\H\root\v2:C.A="x\\y",B=7`)
	f.Add(`C=@`)
	f.Fuzz(func(t *testing.T, s string) {
		r, err := ParseRef(s)
		if err != nil {
			return
		}
		again, err := ParseRef(r.String())
		if err != nil || again.String() != r.String() || !again.Equal(r) {
			t.Errorf("%q is %s, and that %s, %v", s, r, again, err)
		}
	})
}
