package wsman

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"
)

// A Scalar is what a property can hold one or many of. A time.Duration is a
// datetime that is an interval; an *Instance is an embedded one.
type Scalar interface {
	bool | string | uint8 | uint16 | uint32 | uint64 | int8 | int16 | int32 | int64 |
		float32 | float64 | time.Time | time.Duration | Ref | *Instance
}

// A Type is the name of a CIM type as CIM-XML writes it. It is empty for what
// was read from an envelope, which does not tell.
type Type string

const (
	typeReference Type = "reference"
	typeInstance  Type = "instance"
	typeDatetime  Type = "datetime"
	typeBoolean   Type = "boolean"
	typeString    Type = "string"
)

// A Value is what a property or a parameter holds: one, many, or null. The
// zero Value is null.
type Value struct {
	typ   Type
	array bool
	items []item
}

type item struct {
	text     string
	ref      *Ref
	instance *Instance
	null     bool
}

// Of is a single value. Its Go type says its CIM type, so it has to be the one
// that the class declares: Of(uint16(2)).
func Of[T Scalar](v T) Value {
	typ, it := encodeScalar(v)
	return Value{typ: typ, items: []item{it}}
}

// List is an array, possibly empty.
func List[T Scalar](v ...T) Value {
	var zero T
	typ, _ := encodeScalar(zero)
	out := Value{typ: typ, array: true}
	for _, x := range v {
		_, it := encodeScalar(x)
		out.items = append(out.items, it)
	}
	return out
}

// Null is the value that says nothing.
func Null() Value { return Value{} }

// IsNull says whether there is no value. An empty array is none either: an
// envelope cannot tell the two apart.
func (v Value) IsNull() bool {
	return !slices.ContainsFunc(v.items, func(it item) bool { return !it.null })
}

// Len is the number of values, 1 for a single one.
func (v Value) Len() int {
	if v.IsNull() {
		return 0
	}
	return len(v.items)
}

// An Instance is an object of a class, or the results of a method. What it
// does not mention is unknown, not null. It is not safe for writing by several
// goroutines.
type Instance struct {
	Namespace string // empty where unknown
	Class     string // empty for the answer to a query of some properties
	props     []prop
}

type prop struct {
	name  string
	value Value
}

// NewInstance makes an instance without properties, to be sent.
func NewInstance(class string) *Instance { return &Instance{Class: class} }

// Set gives a property its value, and the instance back so that calls chain.
// Only what is set is sent.
func (in *Instance) Set(name string, v Value) *Instance {
	for i := range in.props {
		if strings.EqualFold(in.props[i].name, name) {
			in.props[i].value = v
			return in
		}
	}
	in.props = append(in.props, prop{name, v})
	return in
}

// Value gives a property, and whether the instance mentions it. Names match
// whatever their case.
func (in *Instance) Value(name string) (Value, bool) {
	for _, p := range in.props {
		if strings.EqualFold(p.name, name) {
			return p.value, true
		}
	}
	return Value{}, false
}

// Has says whether a property is there and not null.
func (in *Instance) Has(name string) bool {
	v, ok := in.Value(name)
	return ok && !v.IsNull()
}

// Names gives the names of the properties in the host's order.
func (in *Instance) Names() []string {
	names := make([]string, len(in.props))
	for i, p := range in.props {
		names[i] = p.name
	}
	return names
}

// ErrNull is the class of a property that has no value.
var ErrNull = errors.New("no value")

// A PropertyError says which property is not what was asked for.
type PropertyError struct {
	Class, Property string
	Err             error
}

func (e *PropertyError) Error() string {
	return fmt.Sprintf("property %s.%s: %v", e.Class, e.Property, e.Err)
}

// Unwrap gives the reason.
func (e *PropertyError) Unwrap() error { return e.Err }

// Prop gives a property that has one value. One that is missing or null is an
// error in class ErrNull, and one of many values or another type is an error.
//
//	state, err := wsman.Prop[uint16](job, "JobState")
func Prop[T Scalar](in *Instance, name string) (T, error) {
	all, err := Props[T](in, name)
	var zero T
	switch {
	case err != nil:
		return zero, err
	case len(all) == 0:
		return zero, &PropertyError{in.Class, name, ErrNull}
	case len(all) > 1:
		return zero, &PropertyError{in.Class, name, fmt.Errorf("it has %d values", len(all))}
	}
	return all[0], nil
}

// PropOr is Prop for a property that may be missing or null: then it gives
// otherwise.
func PropOr[T Scalar](in *Instance, name string, otherwise T) (T, error) {
	v, err := Prop[T](in, name)
	if errors.Is(err, ErrNull) {
		return otherwise, nil
	}
	return v, err
}

// Props gives all values of a property, none if it is missing, null or empty.
// A null among several values is an error.
func Props[T Scalar](in *Instance, name string) ([]T, error) {
	v, _ := in.Value(name)
	if v.IsNull() {
		return nil, nil
	}
	out := make([]T, len(v.items))
	for i, it := range v.items {
		err := ErrNull
		if !it.null {
			err = decodeScalar(it, &out[i])
		}
		if err != nil {
			if len(v.items) > 1 {
				err = fmt.Errorf("value %d of %d: %w", i+1, len(v.items), err)
			}
			return nil, &PropertyError{in.Class, name, err}
		}
	}
	return out, nil
}

func encodeScalar[T Scalar](v T) (Type, item) {
	text := func(t Type, s string) (Type, item) { return t, item{text: s} }
	switch v := any(v).(type) {
	case bool:
		return text(typeBoolean, strconv.FormatBool(v))
	case string:
		return text(typeString, v)
	case uint8, uint16, uint32, uint64:
		return text(Type(fmt.Sprintf("%T", v)), fmt.Sprint(v))
	case int8, int16, int32, int64:
		return text("s"+Type(fmt.Sprintf("%T", v)), fmt.Sprint(v))
	case float32:
		return text("real32", strconv.FormatFloat(float64(v), 'g', -1, 32))
	case float64:
		return text("real64", strconv.FormatFloat(v, 'g', -1, 64))
	case time.Time:
		return text(typeDatetime, formatTime(v))
	case time.Duration:
		return text(typeDatetime, formatInterval(v))
	case Ref:
		return typeReference, item{ref: &v}
	case *Instance:
		return typeInstance, item{instance: v, null: v == nil}
	}
	panic("not a Scalar")
}

// decodeScalar reads an item as what dst points to.
func decodeScalar[T Scalar](it item, dst *T) error {
	unsigned := func(bits int) (uint64, error) { return strconv.ParseUint(strings.TrimSpace(it.text), 10, bits) }
	signed := func(bits int) (int64, error) { return strconv.ParseInt(strings.TrimSpace(it.text), 10, bits) }
	var err error
	var u uint64
	var i int64
	var f float64
	switch dst := any(dst).(type) {
	case *bool:
		*dst, err = parseBool(it.text)
	case *string:
		*dst = it.text
		if it.ref != nil {
			*dst = it.ref.String()
		} else if it.instance != nil {
			return fmt.Errorf("it is an embedded %s, not text", it.instance.Class)
		}
		return nil
	case *uint8:
		u, err = unsigned(8)
		*dst = uint8(u)
	case *uint16:
		u, err = unsigned(16)
		*dst = uint16(u)
	case *uint32:
		u, err = unsigned(32)
		*dst = uint32(u)
	case *uint64:
		*dst, err = unsigned(64)
	case *int8:
		i, err = signed(8)
		*dst = int8(i)
	case *int16:
		i, err = signed(16)
		*dst = int16(i)
	case *int32:
		i, err = signed(32)
		*dst = int32(i)
	case *int64:
		*dst, err = signed(64)
	case *float32:
		f, err = strconv.ParseFloat(strings.TrimSpace(it.text), 32)
		*dst = float32(f)
	case *float64:
		*dst, err = strconv.ParseFloat(strings.TrimSpace(it.text), 64)
	case *time.Time:
		*dst, err = parseTime(strings.TrimSpace(it.text))
	case *time.Duration:
		*dst, err = parseInterval(strings.TrimSpace(it.text))
	case *Ref:
		if it.ref != nil {
			*dst = *it.ref
			return nil
		}
		*dst, err = ParseRef(it.text)
		return err
	case **Instance:
		if it.instance != nil {
			*dst = it.instance
			return nil
		}
		*dst, err = ParseInstance(it.text)
		return err
	}
	if err != nil || it.ref != nil || it.instance != nil {
		return fmt.Errorf("%s is no %T", it.shown(), *dst)
	}
	return nil
}

// shown is an item in an error: hosts can send much.
func (it item) shown() string {
	switch {
	case it.ref != nil:
		return "a reference to " + it.ref.Class
	case it.instance != nil:
		return "an embedded " + it.instance.Class
	}
	return shorten(it.text)
}

// shorten quotes the beginning of a text.
func shorten(s string) string {
	const most = 80
	if len(s) <= most {
		return strconv.Quote(s)
	}
	return strconv.Quote(strings.ToValidUTF8(s[:most], "")) + "…"
}

func parseBool(s string) (bool, error) {
	switch strings.ToLower(strings.TrimSpace(s)) {
	case "true", "1":
		return true, nil
	case "false", "0":
		return false, nil
	}
	return false, errors.New("no truth")
}

// formatTime writes a moment as CIM does: yyyymmddHHMMSS.mmmmmm+UUU, with the
// minutes from UTC at the end.
func formatTime(t time.Time) string { return t.UTC().Format("20060102150405.000000") + "+000" }

// formatInterval writes a length of time as CIM does: days, HHMMSS,
// microseconds. There are no negative ones.
func formatInterval(d time.Duration) string {
	d = max(d, 0)
	const day = 24 * time.Hour
	in := d % day
	return fmt.Sprintf("%08d%02d%02d%02d.%06d:000", d/day, in/time.Hour, in/time.Minute%60, in/time.Second%60, in/time.Microsecond%1e6)
}

// parseTime reads a moment: CIM's form, or XML's as envelopes have it.
func parseTime(s string) (time.Time, error) {
	if len(s) == 25 && s[14] == '.' && (s[21] == '+' || s[21] == '-') {
		t, err := time.Parse("20060102150405.000000", s[:21])
		offset, err2 := strconv.ParseUint(s[22:], 10, 16)
		if err = errors.Join(err, err2); err != nil {
			return time.Time{}, err
		}
		west := time.Duration(offset) * time.Minute
		if s[21] == '+' {
			west = -west
		}
		return t.Add(west), nil
	}
	if t, err := time.Parse(time.RFC3339Nano, s); err == nil {
		return t, nil
	}
	return time.Parse("2006-01-02T15:04:05.999999999", s) // a host that means UTC
}

// parseInterval reads a length of time: CIM's form, or XML's with days, hours,
// minutes and seconds.
func parseInterval(s string) (time.Duration, error) {
	bad := fmt.Errorf("%q is no interval", s)
	if len(s) == 25 && s[14] == '.' && s[21:] == ":000" {
		var n [5]int64
		for i, part := range []string{s[:8], s[8:10], s[10:12], s[12:14], s[15:21]} {
			v, err := strconv.ParseUint(part, 10, 32)
			if err != nil {
				return 0, bad
			}
			n[i] = int64(v)
		}
		if n[0] > int64(math.MaxInt64/(24*time.Hour))-1 {
			return 0, bad
		}
		return time.Duration(n[0])*24*time.Hour + time.Duration(n[1])*time.Hour + time.Duration(n[2])*time.Minute +
			time.Duration(n[3])*time.Second + time.Duration(n[4])*time.Microsecond, nil
	}
	rest, ok := strings.CutPrefix(s, "P")
	if !ok {
		return 0, bad
	}
	date, clock, hasClock := strings.Cut(rest, "T")
	var sum float64
	for _, part := range []struct {
		text  string
		units string
		each  []time.Duration
	}{{date, "D", []time.Duration{24 * time.Hour}}, {clock, "HMS", []time.Duration{time.Hour, time.Minute, time.Second}}} {
		for next := 0; part.text != ""; {
			end := strings.IndexAny(part.text, part.units)
			if end < 0 {
				return 0, bad
			}
			unit := strings.IndexByte(part.units, part.text[end])
			v, err := strconv.ParseFloat(part.text[:end], 64)
			if err != nil || v < 0 || unit < next {
				return 0, bad
			}
			sum += v * float64(part.each[unit])
			next, part.text = unit+1, part.text[end+1:]
		}
	}
	if rest == "" || hasClock && clock == "" || !(sum < math.MaxInt64) {
		return 0, bad
	}
	return time.Duration(math.Round(sum)), nil
}
