package keycommand

import (
	"bytes"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
)

// The test program is its own key command: KEYCOMMAND_TEST says how it behaves.
func TestMain(m *testing.M) {
	how := os.Getenv("KEYCOMMAND_TEST")
	if how == "" {
		os.Exit(m.Run())
	}
	var in bytes.Buffer
	in.ReadFrom(os.Stdin)
	switch how {
	case "invert":
		b := in.Bytes()
		for i := range b {
			b[i] ^= 0xff
		}
		os.Stdout.Write(b)
	case "fail":
		os.Stdout.WriteString("half a key")
		os.Stderr.WriteString("the service is asleep\n")
		os.Exit(3)
	case "sleep":
		time.Sleep(time.Minute)
	case "flood":
		os.Stdout.Write(make([]byte, maxOutput+1))
	case "tell":
		os.Stdout.WriteString(strings.Join(os.Args[1:], "|") + "\n" + strings.Join(os.Environ(), "\n"))
	}
	os.Exit(0)
}

func command(t *testing.T, how string) (*Command, *bytes.Buffer) {
	t.Helper()
	t.Setenv("KEYCOMMAND_TEST", how)
	t.Setenv("BACKSTAY_PASSWORD", "hunter2")
	var errs bytes.Buffer
	c, err := Parse(`"`+os.Args[0]+`" 'key 7'`, &errs)
	if err != nil {
		t.Fatal(err)
	}
	return c, &errs
}

func TestTheKeyPassesThroughStdinAndStdout(t *testing.T) {
	c, _ := command(t, "invert")
	key := []byte("0123456789abcdef")
	w, err := c.Wrap(t.Context(), "aa", key)
	if err != nil || bytes.Equal(w, key) {
		t.Fatalf("%q, %v", w, err)
	}
	if got, err := c.Unwrap(t.Context(), "aa", w); err != nil || !bytes.Equal(got, key) {
		t.Errorf("%q, %v", got, err)
	}
}

func TestNoSecretIsInArgumentsOrEnvironment(t *testing.T) {
	c, _ := command(t, "tell")
	out, err := c.Wrap(t.Context(), "repo-7", []byte("the-master-key"))
	if err != nil {
		t.Fatal(err)
	}
	s := string(out)
	if !strings.HasPrefix(s, "key 7|wrap\n") || !strings.Contains(s, "BACKSTAY_REPOSITORY_ID=repo-7") {
		t.Errorf("it was told %q", s)
	}
	if strings.Contains(s, "hunter2") || strings.Contains(s, "the-master-key") {
		t.Errorf("a secret is in %q", s)
	}
}

func TestACommandThatMisbehaves(t *testing.T) {
	c, errs := command(t, "fail")
	if out, err := c.Unwrap(t.Context(), "aa", nil); err == nil || out != nil || !strings.Contains(err.Error(), "exit status 3") || strings.Contains(err.Error(), "half a key") {
		t.Errorf("it failed: %q, %v", out, err)
	}
	if errs.String() != "the service is asleep\n" {
		t.Errorf("its stderr was %q", errs)
	}
	c, _ = command(t, "flood")
	if out, err := c.Unwrap(t.Context(), "aa", nil); err == nil || out != nil || !strings.Contains(err.Error(), "more than") {
		t.Errorf("it floods: %d bytes, %v", len(out), err)
	}
	c, _ = command(t, "sleep")
	c.limit = 200 * time.Millisecond
	began := time.Now()
	if _, err := c.Unwrap(t.Context(), "aa", nil); err == nil || !strings.Contains(err.Error(), "no answer in 200ms") || time.Since(began) > 50*time.Second {
		t.Errorf("it sleeps: %v after %s", err, time.Since(began))
	}
	c, err := Parse("/nowhere/at/all", nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Wrap(t.Context(), "aa", nil); err == nil || !strings.Contains(err.Error(), "/nowhere/at/all") {
		t.Errorf("it does not exist: %v", err)
	}
}

func TestWordsOfACommandLine(t *testing.T) {
	for line, want := range map[string][]string{
		"prog":                   {"prog"},
		" prog  a\tb ":           {"prog", "a", "b"},
		`"C:\Program Files\k" x`: {`C:\Program Files\k`, "x"},
		`prog '' "a'b"c`:         {"prog", "", "a'bc"},
		`prog $HOME;rm *`:        {"prog", "$HOME;rm", "*"},
	} {
		if got, err := split(line); err != nil || !slices.Equal(got, want) {
			t.Errorf("%s: %q, %v", line, got, err)
		}
	}
	for _, line := range []string{"", "  ", `prog "a`, "prog 'a"} {
		if _, err := Parse(line, nil); err == nil {
			t.Errorf("%q is taken for a command", line)
		}
	}
}
