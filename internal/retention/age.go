package retention

import (
	"fmt"
	"strconv"
	"time"
)

// An Age is a stretch of the calendar: months and years are as long as they
// are, counted back from a date.
type Age struct {
	Years, Months, Days, Hours int
}

// maxAge bounds each part, so that no sum leaves what time.Time can hold.
const maxAge = 100_000

// ParseAge reads "14d", "1y6m", "36h" or "2w"; parts go from large to small.
func ParseAge(s string) (Age, error) {
	var a Age
	bad := fmt.Errorf("%q is no age: want such as 14d, 2w, 36h or 1y6m", s)
	order := -1
	for rest := s; rest != ""; {
		n := 0
		for n < len(rest) && rest[n] >= '0' && rest[n] <= '9' {
			n++
		}
		if n == 0 || n == len(rest) {
			return Age{}, bad
		}
		v, err := strconv.Atoi(rest[:n])
		if err != nil || v > maxAge {
			return Age{}, bad
		}
		place := -1
		switch rest[n] {
		case 'y':
			place, a.Years = 0, v
		case 'm':
			place, a.Months = 1, v
		case 'w':
			place, a.Days = 2, a.Days+7*v
		case 'd':
			place, a.Days = 3, a.Days+v
		case 'h':
			place, a.Hours = 4, v
		}
		if place <= order {
			return Age{}, bad
		}
		order, rest = place, rest[n+1:]
	}
	if a == (Age{}) {
		return Age{}, bad
	}
	return a, nil
}

// Before is the moment that lies a before t, on the calendar of t's zone. A
// month that has no such day gives the day after its last.
func (a Age) Before(t time.Time) time.Time {
	return t.AddDate(-a.Years, -a.Months, -a.Days).Add(-time.Duration(a.Hours) * time.Hour)
}

// String is a in the form that ParseAge reads.
func (a Age) String() string {
	var s string
	for _, p := range []struct {
		n    int
		unit string
	}{{a.Years, "y"}, {a.Months, "m"}, {a.Days, "d"}, {a.Hours, "h"}} {
		if p.n != 0 {
			s += strconv.Itoa(p.n) + p.unit
		}
	}
	return s
}
