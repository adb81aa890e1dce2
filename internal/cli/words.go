package cli

import (
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
)

// sizeText is n bytes for people: "1.0 GiB".
func sizeText(n int64) string {
	if n < 0 {
		return "-" + humanize.IBytes(uint64(-n))
	}
	return humanize.IBytes(uint64(n))
}

// timeText is d for people: "0.14 s", "3.2 s", "4m10s".
func timeText(d time.Duration) string {
	switch {
	case d < time.Second:
		return fmt.Sprintf("%.2f s", d.Seconds())
	case d < 100*time.Second:
		return fmt.Sprintf("%.1f s", d.Seconds())
	}
	return d.Round(time.Second).String()
}

// rateText is how fast n bytes in d are, for people: ", 140 MiB/s"; "" where
// that says nothing.
func rateText(n int64, d time.Duration) string {
	if n <= 0 || d < time.Millisecond {
		return ""
	}
	return ", " + sizeText(int64(float64(n)/d.Seconds())) + "/s"
}

// A sizeFlag is a number of bytes: "64K", "10G", "1048576".
type sizeFlag int64

func (f *sizeFlag) String() string { return strconv.FormatInt(int64(*f), 10) }
func (f *sizeFlag) Type() string   { return "SIZE" }
func (f *sizeFlag) Set(s string) error {
	n, err := parseSize(s)
	*f = sizeFlag(n)
	return err
}

// parseSize reads a number of bytes with an optional binary suffix.
func parseSize(s string) (int64, error) {
	t := strings.TrimSuffix(strings.TrimSuffix(strings.ToUpper(strings.TrimSpace(s)), "IB"), "B")
	shift := 0
	if i := strings.IndexByte("KMGTPE", last(t)); i >= 0 {
		shift = 10 * (i + 1)
		t = t[:len(t)-1]
	}
	n, err := strconv.ParseInt(t, 10, 64)
	if err != nil || n < 0 || n > (1<<63-1)>>shift {
		return 0, fmt.Errorf("%q is no size: want a number of bytes such as 65536, 64K or 10G", s)
	}
	return n << shift, nil
}

func last(s string) byte {
	if s == "" {
		return 0
	}
	return s[len(s)-1]
}

// printJSON writes v as one line on stdout.
func (a *app) printJSON(v any) error {
	enc := json.NewEncoder(a.stdout)
	enc.SetEscapeHTML(false)
	return enc.Encode(v)
}

// plural is "1 pack", "2 packs".
func plural(n int64, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return strconv.FormatInt(n, 10) + " " + noun + "s"
}
