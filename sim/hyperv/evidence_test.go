package hyperv_test

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/backstay/backstay/sim/hyperv"
)

// recordings are where traces of real hosts lie.
const recordings = "../../internal/hypervisor/hyperv/testdata/recorded"

// The page shows what the simulator's own list says, and only that claims to be
// recorded of which a trace of a real host is in the tree.
func TestEvidence(t *testing.T) {
	page, err := os.ReadFile("../../docs/design/hyperv-evidence.md")
	if err != nil {
		t.Fatal(err)
	}
	if isRecording("none.jsonl") || isRecording("README.md") || isRecording("../recorded/README.md") {
		t.Error("anything is a recording")
	}
	if want := hyperv.Table(); !strings.Contains(string(page), want) {
		t.Errorf("docs/design/hyperv-evidence.md does not have this table:\n%s", want)
	}
	for _, b := range hyperv.Behaviours {
		if !slices.Contains([]string{hyperv.Recorded, hyperv.Documented, hyperv.Source, hyperv.Guess}, b.Evidence) {
			t.Errorf("%q rests on %q", b.What, b.Evidence)
		}
		if b.Evidence == hyperv.Recorded && !isRecording(b.By) {
			t.Errorf("%q is recorded, and %s has no %q", b.What, recordings, b.By)
		}
		if b.Evidence != hyperv.Guess && b.By == "" {
			t.Errorf("%q is %s by nobody", b.What, b.Evidence)
		}
	}
}

// isRecording says whether by names a recording in the tree.
func isRecording(by string) bool {
	f, err := os.Stat(filepath.Join(recordings, by))
	return err == nil && f.Mode().IsRegular() && filepath.Base(by) == by && filepath.Ext(by) == ".jsonl"
}
