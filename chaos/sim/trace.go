package sim

import (
	"fmt"
	"io"
	"time"
)

// Line is one thing that happened.
type Line struct {
	At   time.Duration
	Who  string
	What string
	Text string
}

// Print writes a trace in columns: time, who, what, particulars.
func Print(out io.Writer, lines []Line) error {
	for _, l := range lines {
		if _, err := fmt.Fprintf(out, "%12s  %-10s %-14s %s\n", stamp(l.At), l.Who, l.What, l.Text); err != nil {
			return err
		}
	}
	return nil
}

func stamp(d time.Duration) string {
	return fmt.Sprintf("%d.%06d", d/time.Second, d%time.Second/time.Microsecond)
}
