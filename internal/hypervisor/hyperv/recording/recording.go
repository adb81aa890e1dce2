// Package recording keeps what a Hyper-V host was asked and answered, without
// what would tell whose host it is, and answers with it again.
//
//	wsman.Client ─ Config.Record ─► Recorder ─ sanitised ─► file ─► Player ─ HTTP ─► wsman.Client
//
// docs/design/hyperv-recordings.md says what stays, what goes, and what a file
// looks like.
package recording

import (
	"bufio"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/backstay/backstay/internal/wsman"
)

// Format and Version begin every recording.
const (
	Format  = "backstay-hyperv-recording"
	Version = 1
)

// Bounds of a recording, in bytes and in exchanges.
const (
	maxBytes     = 256 << 20
	maxExchanges = 100_000
	maxLine      = 16 << 20
)

// A Header is the first line of a recording.
type Header struct {
	Format  string   `json:"format"`
	Version int      `json:"version"`
	Date    string   `json:"date"`         // the day, as 2026-11-22
	OS      string   `json:"os,omitempty"` // version of the host's Windows, as it told it: 10.0.20348
	By      string   `json:"by"`           // the program that recorded it
	Method  []string `json:"method"`       // what was done, in its order
	VM      string   `json:"vm,omitempty"` // of whom it asked, under its pseudonym
	// Nodes are the cluster's other nodes that answered, and Folder is that in
	// which VMs were made: pseudonyms, too.
	Nodes  []string `json:"nodes,omitempty"`
	Folder string   `json:"folder,omitempty"`
	// Unanswered exchanges had no answer, or were repeated for it; LeftOut could
	// not be read, and so not be sanitised. Neither is in the recording.
	Unanswered int `json:"unanswered"`
	LeftOut    int `json:"left_out"`
	// Failed says that it ended before all was asked, since the client did not
	// go on: perhaps because it does not understand this host.
	Failed bool `json:"failed,omitempty"`
}

// An Exchange is each further line: a request and its answer, in clear.
type Exchange struct {
	Step     string `json:"step"` // of Header.Method
	Action   string `json:"action"`
	Status   int    `json:"status"` // of HTTP
	Millis   int64  `json:"ms"`
	Request  string `json:"request"` // the envelope
	Response string `json:"response"`
}

// A Recorder gathers exchanges. Its methods are safe for concurrent use.
type Recorder struct {
	mu         sync.Mutex
	steps      []string
	all        []Exchange
	bytes      int
	unanswered int
	full       bool
}

// Step says what the exchanges that follow belong to.
func (r *Recorder) Step(name string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.steps = append(r.steps, name)
}

// Record is for wsman.Config.
func (r *Recorder) Record(x wsman.Exchange) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if x.Err != nil || x.Response == nil {
		r.unanswered++
		return
	}
	if r.bytes += len(x.Request) + len(x.Response); r.bytes > maxBytes || len(r.all) == maxExchanges {
		r.full = true
		return
	}
	step := ""
	if len(r.steps) > 0 {
		step = r.steps[len(r.steps)-1]
	}
	r.all = append(r.all, Exchange{Step: step, Action: x.Action, Status: x.Status, Millis: x.Took.Milliseconds(),
		Request: string(x.Request), Response: string(x.Response)})
}

// Answered says whether the host answered anything.
func (r *Recorder) Answered() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.all) > 0
}

// About is what is known of a recording besides its exchanges, not sanitised.
type About struct {
	VM     string   // the name that was asked for
	OS     string   // the version that the host told of itself
	Nodes  []string // of the cluster, that answered besides the named host
	Folder string   // in which VMs were made
	By     string   // the program
}

// Recording is what was gathered, sanitised.
func (r *Recorder) Recording(a About, now time.Time) (*Recording, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.full {
		return nil, fmt.Errorf("the host's answers are more than %d MiB or %d exchanges", maxBytes>>20, maxExchanges)
	}
	out := &Recording{Header: Header{Format: Format, Version: Version, Date: now.UTC().Format(time.DateOnly), By: a.By, Method: r.steps, Unanswered: r.unanswered}}
	if versionText.MatchString(a.OS) {
		out.OS = a.OS
	}
	s := newSanitiser()
	out.sanitise(s, r.all, a)
	return out, nil
}

// A Recording is one that was read, or is about to be written.
type Recording struct {
	Header
	Exchanges []Exchange

	// Of one that was just made: how many different values of each kind were
	// replaced, and which words stayed that no number, time or name of XML is.
	Replaced map[string]int
	Stayed   []string
}

// sanitise takes the exchanges over. What to replace is gathered first, and
// numbered: whoever sorts what has an order gets the same.
func (c *Recording) sanitise(s *sanitiser, all []Exchange, a About) {
	for _, x := range all {
		s.envelope(x.Request)
		s.envelope(x.Response)
	}
	header := func() Header {
		h := Header{Folder: s.judge("HostResource", a.Folder, "", 0)}
		if guidText.MatchString(a.VM) {
			h.VM = s.judge("Name", a.VM, "", 0)
		} else {
			h.VM = s.judge("ElementName", a.VM, "", 0)
		}
		for _, node := range a.Nodes {
			h.Nodes = append(h.Nodes, s.judge("Name", node, "", 0))
		}
		return h
	}
	header()
	s.number()
	for _, x := range all {
		var err, err2 error
		x.Request, err = s.envelope(x.Request)
		x.Response, err2 = s.envelope(x.Response)
		if err != nil || err2 != nil || !schema.MatchString(x.Action) {
			c.LeftOut++
			continue
		}
		c.Exchanges = append(c.Exchanges, x)
	}
	h := header()
	c.VM, c.Nodes, c.Folder = h.VM, h.Nodes, h.Folder
	c.Replaced = s.counts()
	c.Stayed = slices.SortedFunc(maps.Keys(s.stayed), func(a, b string) int {
		return cmp.Or(strings.Compare(strings.ToLower(a), strings.ToLower(b)), strings.Compare(a, b))
	})
}

// Write writes a recording.
func (c *Recording) Write(w io.Writer) error {
	b := bufio.NewWriter(w)
	e := json.NewEncoder(b)
	e.SetEscapeHTML(false) // people are to read it
	if err := e.Encode(c.Header); err != nil {
		return err
	}
	for _, x := range c.Exchanges {
		if err := e.Encode(x); err != nil {
			return err
		}
	}
	return b.Flush()
}

// Read reads a recording.
func Read(r io.Reader) (*Recording, error) {
	lines := bufio.NewScanner(io.LimitReader(r, 2*maxBytes))
	lines.Buffer(nil, maxLine)
	c := &Recording{}
	next := func(to any) (bool, error) {
		if !lines.Scan() {
			return false, lines.Err()
		}
		return true, json.Unmarshal(lines.Bytes(), to)
	}
	ok, err := next(&c.Header)
	switch {
	case err != nil:
		return nil, fmt.Errorf("line 1: %w", err)
	case !ok || c.Format != Format:
		return nil, errors.New("it is no recording of a Hyper-V host")
	case c.Version != Version:
		return nil, fmt.Errorf("it is of version %d, and only %d is known", c.Version, Version)
	}
	for {
		var x Exchange
		ok, err := next(&x)
		if err != nil {
			return nil, fmt.Errorf("line %d: %w", len(c.Exchanges)+2, err)
		}
		if !ok {
			return c, nil
		}
		if len(c.Exchanges) == maxExchanges {
			return nil, fmt.Errorf("it has more than %d exchanges", maxExchanges)
		}
		c.Exchanges = append(c.Exchanges, x)
	}
}
