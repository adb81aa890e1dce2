package cli

import (
	"strings"
	"testing"

	"github.com/backstay/backstay/internal/repo"
)

// Who does what the hint says is rid of what was found: a plain repair reads no
// parity, and nothing but its removal helps against a damaged key.
func TestCheckHintNamesWhatHelps(t *testing.T) {
	const repair, key, vacuum = "repo repair --scrub", "repo key remove", "repo vacuum"
	for _, c := range []struct {
		objects []string
		want    []string
	}{
		{[]string{"par/data/aa/aa00"}, []string{repair}},
		{[]string{"keys/0011223344556677"}, []string{key}},
		{[]string{"session/01m81nf2cb3kd870c572xfbrs8-000000"}, []string{vacuum}},
		{[]string{"idx/l0/x", "par/repo.json", "keys/0"}, []string{repair, key, vacuum}},
	} {
		var rep repo.CheckReport
		for _, o := range c.objects {
			rep.Findings = append(rep.Findings, repo.Finding{Object: o})
		}
		hint := checkHint(rep)
		for _, w := range []string{repair, key, vacuum} {
			want := false
			for _, x := range c.want {
				want = want || x == w
			}
			if strings.Contains(hint, w) != want {
				t.Errorf("%v: %s: %q: %v", c.objects, hint, w, !want)
			}
		}
	}
}
