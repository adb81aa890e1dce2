package main

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/backstay/backstay/sim/hyperv"
	"github.com/backstay/backstay/sim/hyperv/host"
	"github.com/backstay/backstay/sim/hyperv/wsman"
)

// A trouble is something that goes wrong on the host or on the way to it.
type trouble struct {
	name, value, what string // value is "" for none, or what it stands for
	// optional says that it may be named without its value.
	optional bool
	set      func(value string, h *host.Trouble, o *troubled) error
}

// troubled is what goes wrong with requests and with the service.
type troubled struct {
	requests    map[int64]wsman.Trouble // by their number, from 1
	pulls       map[int64]wsman.Trouble // the same of Pulls
	envelope    int
	expired     bool
	asked, drew atomic.Int64
}

// troubles are all that --trouble knows, in the order of its help.
var troubles = []trouble{
	{"fail-job", "METHOD", "the next job of that method fails, as CreateSnapshot's when a writer of the guest does", false,
		func(v string, h *host.Trouble, _ *troubled) error {
			put(&h.FailJob, v, "a writer of the guest failed")
			return named(v)
		}},
	{"refuse", "METHOD:CODE", "the next call of that method returns that code, as 32775 of a VM that is busy", false,
		func(v string, h *host.Trouble, _ *troubled) error {
			method, code, _ := strings.Cut(v, ":")
			n, err := strconv.ParseUint(code, 10, 16)
			put(&h.Refuse, method, uint32(n))
			return errors.Join(named(method), err)
		}},
	{"slow-jobs", "TIME", "every job takes so much longer: 500ms, 2m", false,
		func(v string, h *host.Trouble, _ *troubled) (err error) {
			h.SlowJobs, err = time.ParseDuration(v)
			return err
		}},
	{"no-affected", "", "jobs do not tell what they made", false,
		func(_ string, h *host.Trouble, _ *troubled) error { h.NoAffected = true; return nil }},
	{"downgrade", "", "a checkpoint is crash-consistent where application was asked for", false,
		func(_ string, h *host.Trouble, _ *troubled) error { h.Downgrade = true; return nil }},
	{"unequal-arrays", "", "reference points lack the tracking id of their last disk", false,
		func(_ string, h *host.Trouble, _ *troubled) error { h.UnequalArrays = true; return nil }},
	{"short-answers", "BYTES", "a question of changes is answered for at most so many bytes", false,
		func(v string, h *host.Trouble, _ *troubled) (err error) {
			h.ShortAnswers, err = positive(v)
			return err
		}},
	{"no-progress", "", "a question of changes is answered for none", false,
		func(_ string, h *host.Trouble, _ *troubled) error { h.EmptyProgress = true; return nil }},
	{"drop", "N", "the connection ends at the Nth request (1)", true, spoil(wsman.Drop)},
	{"drop-pull", "N", "the connection ends at the Nth Pull (1)", true,
		func(v string, _ *host.Trouble, o *troubled) error {
			n, err := ordinal(v)
			o.pulls[n] = wsman.Drop
			return err
		}},
	{"401", "N", "at the Nth request (1) the host has forgotten who it was", true, spoil(wsman.Unauthorized)},
	{"html", "N", "the Nth request (1) gets a page of a proxy", true, spoil(wsman.HTML)},
	{"unavailable", "N", "the Nth request (1) gets 503, the service restarts", true, spoil(wsman.Unavailable)},
	{"hang", "N", "the Nth request (1) gets no answer", true, spoil(wsman.Hang)},
	{"small-envelope", "BYTES", "larger answers are faults; 8192 is the least", false,
		func(v string, _ *host.Trouble, o *troubled) error {
			n, err := positive(v)
			if err == nil && (n < 8192 || n > 512000) {
				err = errors.New("it is not between 8192 and 512000")
			}
			o.envelope = int(n)
			return err
		}},
	{"expired", "", "the certificate is not valid any more", false,
		func(_ string, _ *host.Trouble, o *troubled) error { o.expired = true; return nil }},
}

func put[V any](m *map[string]V, key string, v V) {
	if *m == nil {
		*m = map[string]V{}
	}
	(*m)[key] = v
}

func spoil(t wsman.Trouble) func(string, *host.Trouble, *troubled) error {
	return func(v string, _ *host.Trouble, o *troubled) error {
		n, err := ordinal(v)
		o.requests[n] = t
		return err
	}
}

func named(method string) error {
	if method == "" {
		return errors.New("it names no method")
	}
	return nil
}

func positive(v string) (int64, error) {
	n, err := strconv.ParseInt(v, 10, 64)
	if err == nil && n <= 0 {
		err = errors.New("it is not positive")
	}
	return n, err
}

func ordinal(v string) (int64, error) {
	if v == "" {
		return 1, nil
	}
	return positive(v)
}

// parseTroubles reads the values of --trouble.
func parseTroubles(all []string) (h host.Trouble, o *troubled, err error) {
	o = &troubled{requests: map[int64]wsman.Trouble{}, pulls: map[int64]wsman.Trouble{}}
	for _, text := range all {
		name, value, has := strings.Cut(text, "=")
		var found *trouble
		for i := range troubles {
			if troubles[i].name == name {
				found = &troubles[i]
			}
		}
		switch {
		case found == nil:
			return h, o, fmt.Errorf("there is no trouble %q; --help has them all", name)
		case has && found.value == "":
			return h, o, fmt.Errorf("the trouble %s takes no value", name)
		case (!has || value == "") && found.value != "" && !found.optional:
			return h, o, fmt.Errorf("the trouble %s needs a value: %s=%s", name, name, found.value)
		}
		if err := found.set(value, &h, o); err != nil {
			return h, o, fmt.Errorf("trouble %s=%s: %w", name, value, err)
		}
	}
	return h, o, nil
}

// fault is for hyperv.Options.
func (o *troubled) fault(action string) wsman.Trouble {
	if strings.HasSuffix(action, "/Pull") {
		if t, ok := o.pulls[o.drew.Add(1)]; ok {
			return t
		}
	}
	return o.requests[o.asked.Add(1)]
}

// into makes the service as troubled as it should be.
func (o *troubled) into(s *hyperv.Options) {
	s.EnvelopeBytes, s.Expired, s.Fault = o.envelope, o.expired, o.fault
}

// troubleHelp lists them all.
func troubleHelp() string {
	var b strings.Builder
	for _, t := range troubles {
		name := t.name
		switch {
		case t.optional:
			name += "[=" + t.value + "]"
		case t.value != "":
			name += "=" + t.value
		}
		fmt.Fprintf(&b, "  %-22s %s\n", name, t.what)
	}
	return b.String()
}
