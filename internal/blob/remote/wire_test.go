package remote

import (
	"errors"
	"strings"
	"testing"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/fault"
)

func TestTargets(t *testing.T) {
	for path, want := range map[string]Target{
		"/v1/web":                         {Repo: "web"},
		"/v1/web/list":                    {Repo: "web", List: true},
		"/v1/web/claims":                  {Repo: "web", Claims: true},
		"/v1/web/settled":                 {Repo: "web", Settled: true},
		"/v1/web/claims/":                 {},
		"/v1/web/claims/x":                {},
		"/v1/web/o/repo.json":             {Repo: "web", Name: "repo.json"},
		"/v1/list/o/list":                 {Repo: "list", Name: "list"},
		"/v1/a.b-c/o/data/ab/0123":        {Repo: "a.b-c", Name: "data/ab/0123"},
		"/v1/web/o/":                      {},
		"/v1/web/":                        {},
		"/v1/web/list/":                   {},
		"/v1/web/o":                       {},
		"/v1/web/O/x":                     {},
		"/v1/":                            {},
		"/v1":                             {},
		"/":                               {},
		"":                                {},
		"v1/web":                          {},
		"/v2/web":                         {},
		"/v1//o/x":                        {},
		"/v1/.backstay":                   {},
		"/v1/../x":                        {},
		"/v1/.":                           {},
		"/v1/Web":                         {},
		"/v1/web/o/../x":                  {},
		"/v1/web/o/x/../../y":             {},
		"/v1/web/o/x//y":                  {},
		"/v1/web/o/.x":                    {},
		"/v1/web/o/tmp/x":                 {},
		"/v1/web/o/lock/writers":          {},
		"/v1/web/o/x%2fy":                 {},
		"/v1/web/o/x\\y":                  {},
		"/v1/web/o/x\x00y":                {},
		"/v1/web?x":                       {},
		"/v1/" + strings.Repeat("w", 101): {},
		"/v1/web/o/" + strings.Repeat("x/", 500) + "x": {},
	} {
		got, err := ParseTarget(path)
		if got != want || (err == nil) == (want == Target{}) {
			t.Errorf("%q: %+v, %v; want %+v", path, got, err, want)
		}
		if err == nil && got.Path() != path {
			t.Errorf("%q is %q again", path, got.Path())
		}
	}
}

// Whatever a request says, what comes out is a name that every store takes, and
// the path that leads to it.
func FuzzParseTarget(f *testing.F) {
	for _, s := range []string{"/v1/web", "/v1/web/list", "/v1/web/claims", "/v1/web/settled", "/v1/web/o/data/ab/01", "/v1/web/o/../x", "/v1/.backstay/o/tls.pem"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, path string) {
		got, err := ParseTarget(path)
		if err != nil {
			return
		}
		if CheckRepo(got.Repo) != nil || got.Name != "" && (blob.CheckName(got.Name) != nil || got.List || got.Claims || got.Settled) {
			t.Fatalf("%q gave %+v", path, got)
		}
		if got.Path() != path {
			t.Fatalf("%q is %q again", path, got.Path())
		}
	})
}

func TestRanges(t *testing.T) {
	for s, want := range map[string][2]int64{
		"bytes=0-0":        {0, 1},
		"bytes=5-9":        {5, 5},
		"bytes=0-67108863": {0, MaxRange},
		"bytes=999999999999999999-999999999999999999": {999999999999999999, 1},
		"bytes=0-67108864":                            {},
		"bytes=9-5":                                   {},
		"bytes=5-":                                    {},
		"bytes=-5":                                    {},
		"bytes=0-1,3-4":                               {},
		"bytes=+1-2":                                  {},
		"bytes= 1-2":                                  {},
		"bytes=1 - 2":                                 {},
		"bytes=0x1-2":                                 {},
		"Bytes=1-2":                                   {},
		"bytes=1-99999999999999999999":                {},
		"bytes=-1-5":                                  {},
		"":                                            {},
	} {
		off, n, err := ParseRange(s)
		if [2]int64{off, n} != want || (err == nil) == (n == 0) {
			t.Errorf("%q: %d, %d, %v; want %v", s, off, n, err, want)
		}
	}
}

func FuzzParseRange(f *testing.F) {
	for _, s := range []string{"bytes=0-0", "bytes=5-9", "bytes=-1-5", "bytes=0-18446744073709551615"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		off, n, err := ParseRange(s)
		if err == nil && (off < 0 || n < 1 || n > MaxRange || off+n < off) {
			t.Fatalf("%q gave %d, %d", s, off, n)
		}
	})
}

// A server may say what it likes in a listing: what a client takes is a name.
func FuzzParseListLine(f *testing.F) {
	for _, s := range []string{"5 data/ab/01", "0 x", "-1 x", "5 ../x", "5  x", "99999999999999999999 x"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, line string) {
		o, err := parseListLine(line)
		if err != nil {
			return
		}
		if o.Bytes < 0 || blob.CheckName(o.Name) != nil {
			t.Fatalf("%q gave %+v", line, o)
		}
	})
}

func TestTokens(t *testing.T) {
	var pin Pin
	pin[3] = 7
	tok, err := NewToken("web01", pin)
	if err != nil {
		t.Fatal(err)
	}
	text := tok.Reveal()
	again, err := ParseToken(text)
	if err != nil || again.Name != "web01" || again.Pin != pin || !again.Secret.Equal(tok.Secret) {
		t.Errorf("%+v, %v", again, err)
	}
	other, err := NewToken("web01", pin)
	if err != nil || other.Secret.Equal(tok.Secret) {
		t.Errorf("two tokens are the same: %v", err)
	}
	secret := strings.Split(text, ".")[2]
	for name, s := range map[string]string{
		"empty": "", "no pin": text[:strings.LastIndex(text, ".")], "cut": text[:len(text)-1], "longer": text + "x", "another magic": "bst2" + text[4:],
		"a bad name": strings.Replace(text, "web01", "Web01", 1), "no name": strings.Replace(text, "web01", "", 1), "two lines": text + "\n" + text,
		"a short secret": strings.Replace(text, secret, secret[:40], 1), "no secret": strings.Replace(text, secret, "", 1),
	} {
		if _, err := ParseToken(s); err == nil {
			t.Errorf("%s: no error", name)
		} else if strings.Contains(err.Error(), secret[:40]) {
			t.Errorf("%s: the error shows the secret", name)
		}
	}
	for _, name := range []string{"", "-x", "a.b", "A", "a/b", "a b", strings.Repeat("x", 65)} {
		if _, err := NewToken(name, pin); err == nil {
			t.Errorf("a token of the name %q", name)
		}
	}
}

func FuzzParseToken(f *testing.F) {
	tok, err := NewToken("web01", Pin{1})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(tok.Reveal())
	f.Add("bst1.x.y.z")
	f.Fuzz(func(t *testing.T, s string) {
		tok, err := ParseToken(s)
		if err == nil && tok.Reveal() != s {
			t.Fatalf("%q is %q again", s, tok.Reveal())
		}
	})
}

func TestURLs(t *testing.T) {
	pin := Pin{1, 2, 3}
	for s, want := range map[string]string{
		"backstay://nas/web":                 "backstay://nas:9443/web",
		"backstay://nas:1/web":               "backstay://nas:1/web",
		"backstay://nas/web/":                "backstay://nas:9443/web",
		"backstay://[::1]:7/a.b":             "backstay://[::1]:7/a.b",
		"backstay://nas/web#" + pin.String(): "backstay://nas:9443/web",
		"backstay://nas":                     "",
		"backstay:///web":                    "",
		"backstay://nas/web/x":               "",
		"backstay://nas/w%2fx":               "",
		"backstay://nas/.x":                  "",
		"backstay://u@nas/web":               "",
		"backstay://u:p@nas/web":             "",
		"backstay://nas/web?x=y":             "",
		"backstay://nas/web#sha256:short":    "",
		"https://nas/web":                    "",
	} {
		l, err := ParseURL(s)
		if (err == nil) != (want != "") || err == nil && l.String() != want {
			t.Errorf("%q: %v, %v; want %q", s, l, err, want)
		}
		if err == nil && strings.Contains(s, "#") != (l.Pin != nil && *l.Pin == pin) {
			t.Errorf("%q: pin %v", s, l.Pin)
		}
	}
}

// Every class survives the way to the client.
func TestClasses(t *testing.T) {
	for name, class := range Classes {
		if got, status := ClassOf(class); got != name || status < 400 {
			t.Errorf("%s: %s, %d", name, got, status)
		}
	}
	if class, status := ClassOf(errors.New("x")); class != "" || status != 500 {
		t.Errorf("an error of no class: %q, %d", class, status)
	}
	if class, _ := ClassOf(fault.ErrCorrupt); class != "" {
		t.Errorf("corrupt is %q", class)
	}
}
