package disk

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/cairnstore/cairn/proto/status"
)

// Rules describe what a faulty disk does wrong, in words: one rule a line, or
// several separated by ';', '#' followed by a blank begins a comment. The first
// rule that fits an operation decides what happens to it.
//
//	rule   = kind [which] [where] effect
//	kind   = read | write | sync | discard | allocate | any
//	which  = #N | #N..M | #N.. | every N | P%     (counted among those that kind and where fit)
//	where  = at OFF..OFF                          (bytes of the disk; K, M, G, T are binary; touches it)
//	effect = fails ERRNO      answered with an error; nothing was done
//	       | lost             answered OK; nothing was done        (write, sync, discard)
//	       | misdirected N    done N bytes further on              (read, write)
//	       | flips N          bit N of what is transferred is wrong (read, write)
//	       | torn N           only the first N bytes are done, answered with EIO (write)
//	       | slow DURATION    done and answered that much later
//	       | hangs            done and answered when the disk is closed
//
// For example:
//
//	write #7 fails EIO
//	sync #1 fails EIO
//	read at 1M..2M flips 13
//	any 1% slow 20ms
type Rules []Rule

// Rule is one line.
type Rule struct {
	Any         bool // of every kind
	Kind        Kind
	First, Last uint64 // 1 ≤ First ≤ Last: numbers it is for
	Every       uint64 // > 0: each Every-th
	Percent     float64
	From, To    int64 // bytes, From < To; To 0: anywhere
	Effect      Effect
	Errno       syscall.Errno
	N           int64 // of misdirected (bytes), flips (bit), torn (bytes)
	Delay       time.Duration
}

// Effect is what goes wrong.
type Effect uint8

// The effects.
const (
	Fails Effect = iota
	Lost
	Misdirected
	Flips
	Torn
	Slow
	Hangs
)

var effectNames = [...]string{Fails: "fails", Lost: "lost", Misdirected: "misdirected", Flips: "flips", Torn: "torn", Slow: "slow", Hangs: "hangs"}

// String returns the word for it.
func (e Effect) String() string { return effectNames[e] }

// errnos are the errors a disk may give.
var errnos = map[string]syscall.Errno{"EIO": syscall.EIO, "ENOSPC": syscall.ENOSPC, "EDQUOT": syscall.EDQUOT, "EINVAL": syscall.EINVAL,
	"EROFS": syscall.EROFS, "EOPNOTSUPP": syscall.EOPNOTSUPP, "ENXIO": syscall.ENXIO, "ENODEV": syscall.ENODEV,
	"ENOMEM": syscall.ENOMEM, "EBADF": syscall.EBADF, "ETIMEDOUT": syscall.ETIMEDOUT, "EREMOTEIO": syscall.EREMOTEIO}

const (
	maxRules     = 256
	maxRulesText = 64 << 10
	maxDelay     = time.Hour
)

// ParseRules reads rules; an error (status.Invalid) names the rule and the word.
func ParseRules(text string) (Rules, error) {
	if len(text) > maxRulesText {
		return nil, status.Errorf(status.Invalid, "rules of %d bytes: at most %d are possible", len(text), maxRulesText)
	}
	var out Rules
	for _, line := range strings.FieldsFunc(text, func(r rune) bool { return r == '\n' || r == ';' }) {
		w := strings.Fields(line)
		for i, word := range w {
			if word == "#" {
				w = w[:i]
				break
			}
		}
		if len(w) == 0 {
			continue
		}
		r, err := parseRule(w)
		if err != nil {
			return nil, status.Errorf(status.Invalid, "disk rule %q: %w", strings.TrimSpace(line), err)
		}
		if out = append(out, r); len(out) > maxRules {
			return nil, status.Errorf(status.Invalid, "more than %d disk rules", maxRules)
		}
	}
	return out, nil
}

// words are what is left of a rule.
type words []string

func (w *words) next(what string) (string, error) {
	if len(*w) == 0 {
		return "", fmt.Errorf("%s is missing at the end", what)
	}
	s := (*w)[0]
	*w = (*w)[1:]
	return s, nil
}

func parseRule(in []string) (Rule, error) {
	w := words(in)
	r := Rule{First: 1, Last: math.MaxUint64}
	kind, err := w.next("the kind of operation")
	if err != nil {
		return r, err
	}
	if err := r.setKind(kind); err != nil {
		return r, err
	}
	for len(w) > 0 {
		word := w[0]
		switch {
		case strings.HasPrefix(word, "#"):
			w = w[1:]
			err = r.setNumbers(word[1:])
		case strings.HasSuffix(word, "%"):
			w = w[1:]
			if r.Percent, err = strconv.ParseFloat(strings.TrimSuffix(word, "%"), 64); err != nil || !(r.Percent > 0 && r.Percent <= 100) {
				err = fmt.Errorf("%q is not a share: above 0%% and at most 100%%", word)
			}
		case word == "every":
			w = w[1:]
			r.Every, err = w.count("after every")
		case word == "at":
			w = w[1:]
			err = r.setRange(&w)
		default:
			return r, r.setEffect(&w)
		}
		if err != nil {
			return r, err
		}
	}
	return r, fmt.Errorf("it does not say what happens: fails, lost, misdirected, flips, torn, slow or hangs")
}

func (r *Rule) setKind(word string) error {
	if r.Any = word == "any"; r.Any {
		return nil
	}
	for k, name := range kindNames {
		if name == word {
			r.Kind = Kind(k)
			return nil
		}
	}
	return fmt.Errorf("%q is not a kind of operation: read, write, sync, discard, allocate or any", word)
}

// count reads a number of at least 1.
func (w *words) count(what string) (uint64, error) {
	word, err := w.next("the number " + what)
	if err != nil {
		return 0, err
	}
	return count(word)
}

func count(word string) (uint64, error) {
	n, err := strconv.ParseUint(word, 10, 64)
	if err != nil || n == 0 {
		return 0, fmt.Errorf("%q is not a number of at least 1", word)
	}
	return n, nil
}

func (r *Rule) setNumbers(word string) (err error) {
	first, last, many := strings.Cut(word, "..")
	if r.First, err = count(first); err != nil {
		return err
	}
	switch {
	case !many:
		r.Last = r.First
	case last != "":
		if r.Last, err = count(last); err != nil {
			return err
		}
		if r.Last < r.First {
			return fmt.Errorf("#%s ends before it begins", word)
		}
	}
	return nil
}

func (r *Rule) setRange(w *words) error {
	word, err := w.next("the range after at")
	if err != nil {
		return err
	}
	from, to, ok := strings.Cut(word, "..")
	if !ok {
		return fmt.Errorf("%q is not a range of bytes: write 1M..2M", word)
	}
	if r.From, err = bytesOf(from); err != nil {
		return err
	}
	if r.To, err = bytesOf(to); err != nil {
		return err
	}
	if r.To <= r.From {
		return fmt.Errorf("the range %s ends before it begins", word)
	}
	return nil
}

// bytesOf reads a number of bytes with an optional K, M, G or T.
func bytesOf(word string) (int64, error) {
	num, shift := word, 0
	if i := strings.IndexByte("KMGT", last(word)); i >= 0 {
		num, shift = word[:len(word)-1], 10*(i+1)
	}
	n, err := strconv.ParseInt(num, 10, 64)
	if err != nil || n < 0 || n > math.MaxInt64>>shift {
		return 0, fmt.Errorf("%q is not a number of bytes", word)
	}
	return n << shift, nil
}

func last(s string) byte {
	if s == "" {
		return 0
	}
	return s[len(s)-1]
}

func (r *Rule) setEffect(w *words) error {
	word, err := w.next("the effect")
	if err != nil {
		return err
	}
	found := false
	for e, name := range effectNames {
		if name == word {
			r.Effect, found = Effect(e), true
		}
	}
	if !found {
		return fmt.Errorf("%q is neither a condition nor an effect: fails, lost, misdirected, flips, torn, slow or hangs", word)
	}
	switch r.Effect {
	case Fails:
		err = r.setErrno(w)
	case Misdirected, Flips, Torn:
		var arg string
		if arg, err = w.next("a number after " + word); err == nil {
			r.N, err = bytesOf(arg)
		}
	case Slow:
		var arg string
		if arg, err = w.next("a duration after slow"); err == nil {
			if r.Delay, err = time.ParseDuration(arg); err != nil || r.Delay <= 0 || r.Delay > maxDelay {
				err = fmt.Errorf("%q is not a duration above 0 and up to %v: write 20ms", arg, maxDelay)
			}
		}
	}
	if err != nil {
		return err
	}
	if len(*w) > 0 {
		return fmt.Errorf("%q is too much: nothing follows the effect", (*w)[0])
	}
	return r.fits()
}

func (r *Rule) setErrno(w *words) error {
	word, err := w.next("the error after fails")
	if err != nil {
		return err
	}
	var ok bool
	if r.Errno, ok = errnos[word]; !ok {
		return fmt.Errorf("%q is not an error a disk gives: EIO, ENOSPC, …", word)
	}
	return nil
}

// fits reports whether the effect makes sense for the kind.
func (r *Rule) fits() error {
	transfers := !r.Any && (r.Kind == Read || r.Kind == Write)
	ok := true
	switch r.Effect {
	case Lost:
		ok = !r.Any && r.Kind != Read && r.Kind != Allocate
	case Misdirected, Flips:
		ok = transfers
	case Torn:
		ok = !r.Any && r.Kind == Write
	}
	if !ok {
		return fmt.Errorf("%s cannot happen to this kind of operation", r.Effect)
	}
	return nil
}

// String writes the rule as ParseRules reads it.
func (r Rule) String() string {
	var b strings.Builder
	b.WriteString("any")
	if !r.Any {
		b.Reset()
		b.WriteString(r.Kind.String())
	}
	switch {
	case r.First == r.Last:
		fmt.Fprintf(&b, " #%d", r.First)
	case r.Last != math.MaxUint64:
		fmt.Fprintf(&b, " #%d..%d", r.First, r.Last)
	case r.First > 1:
		fmt.Fprintf(&b, " #%d..", r.First)
	}
	if r.Every > 0 {
		fmt.Fprintf(&b, " every %d", r.Every)
	}
	if r.Percent > 0 {
		fmt.Fprintf(&b, " %s%%", strconv.FormatFloat(r.Percent, 'g', -1, 64))
	}
	if r.To > 0 {
		fmt.Fprintf(&b, " at %d..%d", r.From, r.To)
	}
	b.WriteString(" " + r.Effect.String())
	switch r.Effect {
	case Fails:
		for name, e := range errnos {
			if e == r.Errno {
				b.WriteString(" " + name)
			}
		}
	case Misdirected, Flips, Torn:
		fmt.Fprintf(&b, " %d", r.N)
	case Slow:
		b.WriteString(" " + r.Delay.String())
	}
	return b.String()
}
