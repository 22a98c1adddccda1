// The curves: a line for each run, faint where a running median is drawn over it, validation dashed.
(() => {
  const element = document.getElementById("curves-data");
  if (!element) return;
  const data = JSON.parse(element.textContent);
  const over = document.getElementById("over");
  const logX = document.getElementById("log-x");
  const control = (chart, kind) => document.querySelector(`[data-${kind}=${chart.name}]`);

  const probe = document.body.appendChild(document.createElement("span"));
  probe.hidden = true;
  const colour = (name) => {
    probe.style.color = `var(${name})`;
    return getComputedStyle(probe).color;
  };

  // Plotly takes some tags in names for its own.
  const asText = (name) => name.replaceAll("&", "&amp;").replaceAll("<", "&lt;");

  const tracesOf = (key) => {
    const found = [];
    for (const series of data.series[key]) {
      const name = asText(data.runs[series.run] + (series.variant ? ` (${series.variant})` : ""));
      const line = { color: colour(`--run-${series.run % 8}`), dash: series.variant ? "dash" : "solid", width: 2 };
      const values = { x: series[over.value], y: series.y, name, legendgroup: name, line, type: "scatter" };
      values.mode = series.variant || series.y.length < 30 ? "lines+markers" : "lines";
      values.marker = { size: 5 };
      if (series.my) {
        values.opacity = 0.35;
        values.line = { ...line, width: 1 };
        values.showlegend = false;
        const median = { ...values, x: series["m" + over.value], y: series.my, line, opacity: 1 };
        found.push(values, { ...median, showlegend: true, hoverinfo: "skip" });
      } else {
        found.push(values);
      }
    }
    return found;
  };

  const events = () => data.events.map((event) => ({
    type: "line", x0: event.step, x1: event.step, yref: "paper", y0: 0, y1: 1,
    line: { color: colour(`--run-${event.run % 8}`), width: 1, dash: "dot" },
  }));

  const axis = (title, logarithmic) => ({
    title: { text: asText(title), standoff: 8 }, type: logarithmic ? "log" : "linear", gridcolor: colour("--line"),
    linecolor: colour("--line"), zerolinecolor: colour("--line"), automargin: true, hoverformat: ".5~g",
    nticks: 9,
  });

  const draw = (chart) => {
    const plot = document.getElementById(`plot-${chart.name}`);
    const key = control(chart, "values").value;
    const logY = control(chart, "log");
    const title = over.value === "x" ? "step" : `${data.time_unit} of training`;
    const traces = tracesOf(key);
    const layout = {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: colour("--ink"), size: 13 }, margin: { l: 8, r: 8, t: 36, b: 8 },
      xaxis: axis(title, logX.checked), yaxis: axis(chart.units[key] || key, logY.checked),
      hovermode: "x unified", hoverlabel: { bgcolor: colour("--card"), font: { color: colour("--ink") } },
      legend: { orientation: "h", yref: "container", y: 0 }, showlegend: traces.length > 1,
      modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("--muted"), activecolor: colour("--accent") },
      shapes: over.value === "x" ? events() : [], uirevision: `${key} ${over.value} ${logX.checked} ${logY.checked}`,
    };
    plot.setAttribute("aria-label", `${key} over ${title}, of ${data.runs.join(", ")}`);
    Plotly.react(plot, traces, layout, {
      responsive: true, displaylogo: false, displayModeBar: true,
      // Of Plotly's own buttons one would send the values to its makers.
      showSendToCloud: false, modeBarButtons: [["zoom2d", "pan2d", "resetScale2d", "toImage"]],
    });
  };

  const drawAll = () => data.charts.forEach(draw);
  for (const each of [over, logX]) each.addEventListener("change", drawAll);
  for (const chart of data.charts) {
    for (const kind of ["values", "log"]) control(chart, kind).addEventListener("change", () => draw(chart));
  }
  document.addEventListener("themechange", drawAll);
  drawAll();
})();
