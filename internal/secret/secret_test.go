package secret

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"testing"
)

func TestNoWayOfPrintingShowsTheBytes(t *testing.T) {
	s := New([]byte("hunter2"))
	var log strings.Builder
	slog.New(slog.NewTextHandler(&log, nil)).Info("x", "s", s, "in", struct{ S Bytes }{s})
	js, err := json.Marshal(map[string]any{"s": s, "p": &s})
	if err != nil {
		t.Fatal(err)
	}
	for _, out := range []string{
		fmt.Sprint(s), fmt.Sprintf("%v %+v %#v %s %q %x", s, s, s, s, s, s),
		fmt.Sprintf("%v %+v", struct{ S Bytes }{s}, []Bytes{s}), fmt.Sprintf("%v %+v %#v", struct{ s Bytes }{s}, struct{ s *Bytes }{&s}, struct{ s Bytes }{s}), log.String(), string(js),
	} {
		if strings.Contains(out, "hunter2") || strings.Contains(out, "68756e74657232") || strings.Contains(out, "104 117") || strings.Contains(out, "0x68, 0x75") {
			t.Errorf("the secret shows in %q", out)
		}
	}
	if !s.Equal(New([]byte("hunter2"))) || s.Equal(New([]byte("hunter3"))) || s.Equal(New(nil)) {
		t.Error("Equal is wrong")
	}
	s.Wipe()
	if string(s.Reveal()) != "\x00\x00\x00\x00\x00\x00\x00" {
		t.Error("Wipe left something")
	}
}
