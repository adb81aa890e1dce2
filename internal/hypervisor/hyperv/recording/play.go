package recording

import (
	"bytes"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"regexp"
	"strings"
	"sync"
)

// A Player answers as a recording says, in its order, to whoever asks the same:
// requests are compared as XML, without their address, and what the recording
// has pseudonyms for may be anything, as long as it is always the same. It is
// an http.Handler for the body of WS-Management; signing in is no matter of it.
type Player struct {
	mu     sync.Mutex
	left   []Exchange
	done   int
	bound  map[string]string // what the client says for a pseudonym
	failed bool              // the recording ends too early
	err    error
}

// NewPlayer makes a Player of a recording.
func NewPlayer(c *Recording) *Player {
	return &Player{left: c.Exchanges, bound: map[string]string{}, failed: c.Failed}
}

// Err is what the client asked otherwise than the recording has it, or that it
// did not ask all. That it asks for more is no error where the recording failed.
func (p *Player) Err() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.err == nil && len(p.left) > 0 {
		return fmt.Errorf("after %d requests the client is done, and the recording goes on for %d: first %s", p.done, len(p.left), p.left[0].Action)
	}
	return p.err
}

// ServeHTTP answers one request.
func (p *Player) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxLine))
	if err != nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	answer, status, err := p.next(body)
	if err != nil {
		if p.err == nil && !(p.failed && errors.Is(err, errOver)) {
			p.err = fmt.Errorf("request %d: %w", p.done+1, err)
		}
		http.Error(w, err.Error(), http.StatusNotImplemented)
		return
	}
	w.Header().Set("Content-Type", "application/soap+xml;charset=UTF-8")
	w.WriteHeader(status)
	w.Write(answer) // a client that is gone needs no answer
}

var errOver = errors.New("the recording is over")

func (p *Player) next(body []byte) (answer []byte, status int, err error) {
	if p.err != nil {
		return nil, 0, p.err
	}
	if len(p.left) == 0 {
		return nil, 0, errOver
	}
	x := p.left[0]
	want, err := parse([]byte(x.Request))
	if err != nil {
		return nil, 0, fmt.Errorf("the recorded one: %w", err)
	}
	got, err := parse(body)
	if err != nil {
		return nil, 0, err
	}
	if err := p.same(want, got, ""); err != nil {
		return nil, 0, fmt.Errorf("%w; recorded is %s of the step %q", err, x.Action, x.Step)
	}
	p.left, p.done = p.left[1:], p.done+1
	return []byte(pseudonym.ReplaceAllStringFunc(x.Response, func(s string) string {
		if live, ok := p.bound[s]; ok {
			var b bytes.Buffer
			xml.EscapeText(&b, []byte(live))
			return b.String()
		}
		return s
	})), x.Status, nil
}

var pseudonym = regexp.MustCompile(`\b(word[0-9]{5,}|text[0-9]{5,}|9[0-9]{6}|02[0-9]{10}|[0-9]{8}-0000-4000-8000-000000000000)\b`)

// same compares what was recorded with what is asked now.
func (p *Player) same(want, got *node, where string) error {
	where += "/" + want.name.Local
	switch {
	case want.name != got.name:
		return fmt.Errorf("%s: recorded is %q, asked is %q", where, want.name, got.name)
	case strings.HasSuffix(where, "/Header/To"):
		return nil
	case len(want.attr) != len(got.attr):
		return fmt.Errorf("%s: recorded are the attributes %v, asked %v", where, want.attr, got.attr)
	case len(want.children) != len(got.children):
		return fmt.Errorf("%s: recorded are %d elements, asked %d", where, len(want.children), len(got.children))
	}
	for name, v := range want.attr {
		if err := p.text(v, got.attr[name], where+"@"+name.Local); err != nil {
			return err
		}
	}
	if err := p.text(want.text, got.text, where); err != nil {
		return err
	}
	for i := range want.children {
		if err := p.same(want.children[i], got.children[i], where); err != nil {
			return err
		}
	}
	return nil
}

// text compares two texts, and learns what stands for a pseudonym.
func (p *Player) text(want, got, where string) error {
	if strings.HasPrefix(want, "<") && strings.HasPrefix(got, "<") {
		a, err := parse([]byte(want))
		b, err2 := parse([]byte(got))
		if err == nil && err2 == nil {
			return p.same(a, b, where)
		}
	}
	// Each pseudonym is what it stands for, or anything if that is not known yet.
	var form strings.Builder
	var unknown []string
	at := 0
	for _, m := range pseudonym.FindAllStringIndex(want, -1) {
		form.WriteString(regexp.QuoteMeta(want[at:m[0]]))
		name := want[m[0]:m[1]]
		if live, ok := p.bound[name]; ok {
			form.WriteString(regexp.QuoteMeta(live))
		} else {
			form.WriteString("(.+?)")
			unknown = append(unknown, name)
		}
		at = m[1]
	}
	form.WriteString(regexp.QuoteMeta(want[at:]))
	re, err := regexp.Compile(`(?s)^` + form.String() + `$`)
	if err != nil {
		return fmt.Errorf("%s: %w", where, err)
	}
	m := re.FindStringSubmatch(got)
	if m == nil {
		return fmt.Errorf("%s: recorded is %q, asked is %q", where, want, got)
	}
	fresh := map[string]string{}
	for i, name := range unknown {
		if live, twice := fresh[name]; twice && live != m[i+1] {
			return fmt.Errorf("%s: %s of the recording is both %q and %q", where, name, live, m[i+1])
		}
		fresh[name] = m[i+1]
	}
	maps.Copy(p.bound, fresh)
	return nil
}

// A node is an element with its names resolved.
type node struct {
	name     xml.Name
	attr     map[xml.Name]string
	children []*node
	text     string // without white space around it
}

func parse(data []byte) (*node, error) {
	d := xml.NewDecoder(bytes.NewReader(data))
	top := &node{}
	stack := []*node{top}
	for {
		tok, err := d.Token()
		if err == io.EOF {
			break
		}
		if err != nil {
			return nil, err
		}
		last := stack[len(stack)-1]
		switch tok := tok.(type) {
		case xml.StartElement:
			if len(stack) > maxDepth {
				return nil, errors.New("elements lie too deep")
			}
			n := &node{name: tok.Name, attr: map[xml.Name]string{}}
			for _, a := range tok.Attr {
				if a.Name.Space != "xmlns" && a.Name.Local != "xmlns" {
					n.attr[a.Name] = a.Value
				}
			}
			last.children = append(last.children, n)
			stack = append(stack, n)
		case xml.EndElement:
			last.text = strings.TrimSpace(last.text)
			stack = stack[:len(stack)-1]
		case xml.CharData:
			last.text += string(tok)
		}
	}
	if len(top.children) != 1 {
		return nil, errors.New("it is no XML document")
	}
	return top.children[0], nil
}
