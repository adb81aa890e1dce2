package cim

import (
	"errors"
	"fmt"
	"strings"
)

// ErrQuery is the class of every "the host does not take this query".
var ErrQuery = errors.New("invalid query")

// A Source has instances. Those of a class include those of its subclasses.
type Source interface {
	Instances(namespace, class string) []*Instance
}

// A Query is a statement of WQL: SELECT … FROM … [WHERE a = 'b' AND …],
// ASSOCIATORS OF {…} [WHERE …] or REFERENCES OF {…} [WHERE …].
type Query struct {
	Namespace string
	Class     string   // of a SELECT
	Columns   []string // nil for all
	where     []condition

	of         *Ref // of ASSOCIATORS and REFERENCES
	references bool
	options    map[string]string // by their names in lower case
}

type condition struct {
	within string // the object that has field, "" for the instance itself
	field  Field
	op     string
	value  string
	null   bool
}

// ParseQuery reads a statement and checks it against the class table.
func ParseQuery(namespace, text string) (*Query, error) {
	words, err := tokens(text)
	if err != nil {
		return nil, err
	}
	p := &queryParser{words: words}
	q := &Query{Namespace: namespace}
	switch {
	case p.keyword("select"):
		err = q.parseSelect(p)
	case p.keyword("associators"):
		err = q.parseOf(p)
	case p.keyword("references"):
		q.references = true
		err = q.parseOf(p)
	default:
		err = fmt.Errorf("%w: it begins with %q", ErrQuery, p.peek())
	}
	if err != nil {
		return nil, err
	}
	if p.peek() != "" {
		return nil, fmt.Errorf("%w: %q behind its end", ErrQuery, p.peek())
	}
	return q, nil
}

func (q *Query) parseSelect(p *queryParser) error {
	for {
		column := p.next()
		if column == "" {
			return fmt.Errorf("%w: no FROM", ErrQuery)
		}
		if column != "*" {
			q.Columns = append(q.Columns, column)
		}
		if !p.keyword(",") {
			break
		}
	}
	if !p.keyword("from") {
		return fmt.Errorf("%w: %q instead of FROM", ErrQuery, p.peek())
	}
	q.Class = p.next()
	c := Lookup(q.Namespace, q.Class)
	if c == nil {
		return fmt.Errorf("%w: no class %q", ErrQuery, q.Class)
	}
	for _, column := range q.Columns {
		if _, ok := c.Property(column); !ok && !strings.HasPrefix(column, "__") {
			return fmt.Errorf("%w: %s has no property %q", ErrQuery, c.Name, column)
		}
	}
	if !p.keyword("where") {
		return nil
	}
	for {
		name := p.next()
		of, within := c, ""
		if object, inner, ok := strings.Cut(name, "."); ok {
			if f, ok := c.Property(object); ok && f.Type == "object" {
				of, within, name = Lookup(q.Namespace, f.Of), f.Name, inner
			}
		}
		f, ok := of.Property(name)
		if !ok {
			return fmt.Errorf("%w: %s has no property %q", ErrQuery, c.Name, name)
		}
		if f.Of != "" || f.Array {
			return fmt.Errorf("%w: %s.%s cannot be asked for", ErrQuery, c.Name, f.Name)
		}
		cond := condition{within: within, field: f, op: p.next()}
		switch strings.ToLower(cond.op) {
		case "=", "<>", "!=":
			value := p.next()
			if strings.EqualFold(value, "null") {
				cond.null = true
				break
			}
			cond.value = unquote(value)
			if f.Type == "boolean" {
				cond.value = strings.ToLower(cond.value)
			}
			if err := Lexical(f.Type, cond.value); err != nil {
				return fmt.Errorf("%w: %s: %w", ErrQuery, f.Name, err)
			}
		case "is":
			if p.keyword("not") {
				cond.op = "<>"
			} else {
				cond.op = "="
			}
			if !p.keyword("null") {
				return fmt.Errorf("%w: IS %q", ErrQuery, p.peek())
			}
			cond.null = true
		default:
			return fmt.Errorf("%w: operator %q", ErrQuery, cond.op)
		}
		q.where = append(q.where, cond)
		if !p.keyword("and") {
			return nil
		}
	}
}

func (q *Query) parseOf(p *queryParser) error {
	if !p.keyword("of") {
		return fmt.Errorf("%w: %q instead of OF", ErrQuery, p.peek())
	}
	path := p.next()
	if len(path) < 2 || path[0] != '{' {
		return fmt.Errorf("%w: %q instead of {…}", ErrQuery, path)
	}
	ref, err := ParsePath(path[1:len(path)-1], q.Namespace)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrQuery, err)
	}
	c := Lookup(ref.Namespace, ref.Class)
	if c == nil {
		return fmt.Errorf("%w: no class %q", ErrQuery, ref.Class)
	}
	for k := range ref.Keys {
		if f, ok := c.Property(k); !ok || !f.Key {
			return fmt.Errorf("%w: %s has no key %q", ErrQuery, c.Name, k)
		}
	}
	q.of = &ref
	q.options = map[string]string{}
	if !p.keyword("where") {
		return nil
	}
	for p.peek() != "" {
		name := strings.ToLower(p.next())
		switch name {
		case "assocclass", "resultclass", "role", "resultrole":
			if !p.keyword("=") {
				return fmt.Errorf("%w: %q behind %s", ErrQuery, p.peek(), name)
			}
			q.options[name] = unquote(p.next())
		case "classdefsonly", "keysonly":
			return fmt.Errorf("%w: %s is not known here", ErrQuery, name)
		default:
			return fmt.Errorf("%w: %q", ErrQuery, name)
		}
	}
	for _, name := range []string{"assocclass", "resultclass"} {
		if class := q.options[name]; class != "" && Lookup(q.Namespace, class) == nil {
			return fmt.Errorf("%w: no class %q", ErrQuery, class)
		}
	}
	return nil
}

// memory asks a Source once for each class.
type memory struct {
	from Source
	had  map[[2]string][]*Instance
}

func (m memory) Instances(namespace, class string) []*Instance {
	key := [2]string{namespace, class}
	list, ok := m.had[key]
	if !ok {
		list = m.from.Instances(namespace, class)
		m.had[key] = list
	}
	return list
}

// Run is what s has for q.
func (q *Query) Run(s Source) []*Instance {
	s = memory{from: s, had: map[[2]string][]*Instance{}}
	if q.of != nil {
		return q.associated(s)
	}
	var out []*Instance
	for _, inst := range s.Instances(q.Namespace, q.Class) {
		if q.matches(inst) {
			out = append(out, inst)
		}
	}
	return out
}

func (q *Query) matches(inst *Instance) bool {
	for _, c := range q.where {
		of := inst
		if c.within != "" {
			of = inst.Get(c.within).Object
		}
		var v Value
		if of != nil {
			v = of.Get(c.field.Name)
		}
		equal := v.Set && strings.EqualFold(v.String(), c.value)
		if c.null {
			equal = !v.Set
		}
		if equal != (c.op == "=") {
			return false
		}
	}
	return true
}

func (q *Query) associated(s Source) []*Instance {
	var out []*Instance
	seen := map[string]bool{}
	for _, c := range Classes(q.Namespace) {
		if !c.Association || q.options["assocclass"] != "" && !c.Is(q.options["assocclass"]) {
			continue
		}
		if q.references && q.options["resultclass"] != "" && !c.Is(q.options["resultclass"]) {
			continue
		}
		for _, row := range s.Instances(q.Namespace, c.Name) {
			out = append(out, q.ends(s, row, seen)...)
		}
	}
	return out
}

// ends is what row leads to from the object that was asked about.
func (q *Query) ends(s Source, row *Instance, seen map[string]bool) []*Instance {
	var out []*Instance
	for _, from := range row.Class.Properties {
		v := row.Get(from.Name)
		if v.Ref == nil || !v.Ref.Equal(*q.of) || q.options["role"] != "" && !strings.EqualFold(from.Name, q.options["role"]) {
			continue
		}
		if q.references {
			return []*Instance{row}
		}
		for _, to := range row.Class.Properties {
			w := row.Get(to.Name)
			if to.Name == from.Name || w.Ref == nil || q.options["resultrole"] != "" && !strings.EqualFold(to.Name, q.options["resultrole"]) {
				continue
			}
			for _, inst := range s.Instances(w.Ref.Namespace, w.Ref.Class) {
				path := inst.Ref().Path()
				if !inst.Ref().Equal(*w.Ref) || seen[path] || q.options["resultclass"] != "" && !inst.Class.Is(q.options["resultclass"]) {
					continue
				}
				seen[path] = true
				out = append(out, inst)
			}
		}
	}
	return out
}

type queryParser struct {
	words []string
}

func (p *queryParser) peek() string {
	if len(p.words) == 0 {
		return ""
	}
	return p.words[0]
}

func (p *queryParser) next() string {
	w := p.peek()
	if w != "" {
		p.words = p.words[1:]
	}
	return w
}

func (p *queryParser) keyword(w string) bool {
	if strings.EqualFold(p.peek(), w) {
		p.next()
		return true
	}
	return false
}

// tokens cuts a statement into words, quoted texts with their quotes, the
// braces of OF {…} with what is between them, and signs.
func tokens(text string) ([]string, error) {
	var out []string
	for i := 0; i < len(text); {
		c := text[i]
		switch {
		case c == ' ' || c == '\t' || c == '\r' || c == '\n':
			i++
		case c == '\'' || c == '"' || c == '{':
			end := c
			if c == '{' {
				end = '}'
			}
			var quote byte // within the braces
			j := i + 1
			for ; j < len(text) && (text[j] != end || quote != 0); j++ {
				switch {
				case text[j] == '\\':
					j++
				case c == '{' && quote == 0 && (text[j] == '\'' || text[j] == '"'):
					quote = text[j]
				case quote != 0 && text[j] == quote:
					quote = 0
				}
			}
			if j >= len(text) {
				return nil, fmt.Errorf("%w: %c without its end", ErrQuery, c)
			}
			out = append(out, text[i:j+1])
			i = j + 1
		case strings.IndexByte("=,<>!*", c) >= 0:
			j := i + 1
			if (c == '<' || c == '!') && j < len(text) && (text[j] == '>' || text[j] == '=') {
				j++
			}
			out = append(out, text[i:j])
			i = j
		default:
			j := i
			for j < len(text) && strings.IndexByte(" \t\r\n=,<>!*'\"{", text[j]) < 0 {
				j++
			}
			out = append(out, text[i:j])
			i = j
		}
	}
	return out, nil
}

// unquote is the text in quotes, with backslashes resolved.
func unquote(s string) string {
	if len(s) < 2 || s[0] != '\'' && s[0] != '"' {
		return s
	}
	var b strings.Builder
	for i := 1; i < len(s)-1; i++ {
		if s[i] == '\\' && i+1 < len(s)-1 {
			i++
		}
		b.WriteByte(s[i])
	}
	return b.String()
}
