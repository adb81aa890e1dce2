package hyperv_test

import (
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/backstay/backstay/sim/hyperv"
)

// The page shows what the simulator's own list says, and nothing claims to be
// recorded: no trace of a real host is in the tree.
func TestEvidence(t *testing.T) {
	page, err := os.ReadFile("../../docs/design/hyperv-evidence.md")
	if err != nil {
		t.Fatal(err)
	}
	if want := hyperv.Table(); !strings.Contains(string(page), want) {
		t.Errorf("docs/design/hyperv-evidence.md does not have this table:\n%s", want)
	}
	for _, b := range hyperv.Behaviours {
		if !slices.Contains([]string{hyperv.Documented, hyperv.Source, hyperv.Guess}, b.Evidence) {
			t.Errorf("%q rests on %q", b.What, b.Evidence)
		}
		if b.Evidence != hyperv.Guess && b.By == "" {
			t.Errorf("%q is %s by nobody", b.What, b.Evidence)
		}
	}
}
