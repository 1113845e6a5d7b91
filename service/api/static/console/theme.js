// Light or dark: the system's choice until the person makes one.

import { cell } from "./cell.js";

const STORED = "adapterd-theme";
const system = matchMedia("(prefers-color-scheme: dark)");

const chosen = () => localStorage.getItem(STORED);
const current = () => chosen() ?? (system.matches ? "dark" : "light");

export const theme = cell(current());

function apply() {
  if (chosen()) document.documentElement.dataset.theme = chosen();
  theme.set(current());
}

export function toggleTheme() {
  localStorage.setItem(STORED, current() === "dark" ? "light" : "dark");
  apply();
}

system.addEventListener("change", apply);
apply();
